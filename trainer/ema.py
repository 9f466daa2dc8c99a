"""Exponential moving average of the retrained parameters, in float32."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trainer.parallel.sharded_tensors import local_tensor, shard_like


def check_decay(decay: float) -> None:
    """Raises ValueError unless 0 <= decay < 1."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"got EMA decay {decay}, expected 0 <= decay < 1.")


class Ema:
    """Averages of the parameters it is given, updated after each optimiser step.

    torch's `AveragedModel` copies the whole module, 20 GB here, so only its update rule is used. Of a sharded parameter
    each rank averages its own part: an update communicates nothing.

    Args:
        parameters: name -> live parameter.
        decay: final decay. Update n uses min(decay, (1 + n) / (10 + n)), so that the random weights of the start soon
            lose their influence.
    """

    def __init__(self, parameters: Mapping[str, Tensor], *, decay: float = 0.999) -> None:
        check_decay(decay)
        self.decay = decay
        self.updates = 0
        self._live = dict(parameters)
        self.average = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Updates the averages; to be called once per optimiser step, not per micro-batch."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [local_tensor(p.detach()).float() for p in self._live.values()]
        get_ema_multi_avg_fn(decay)([local_tensor(average) for average in self.average.values()], live, None)
        self.updates += 1

    def to(self, device: torch.device | str) -> None:
        """Moves the averages to `device`; the live parameters stay where they are."""
        self.average = {name: value.to(device) for name, value in self.average.items()}

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Inside, the live parameters hold the averages; afterwards, also when something raises, their own values."""
        with swapped_values(self._live, self.average):
            yield

    def state_dict(self) -> dict:
        """Averages (sharded as the parameters are) and number of updates."""
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state: Mapping) -> None:
        """Copies full averages into this rank's, in place.

        Raises:
            ValueError: if the names differ from the retrained parameters.
        """
        if set(state["average"]) != set(self.average):
            odd = sorted(set(state["average"]) ^ set(self.average))[:4]
            raise ValueError(
                f"the EMA in the checkpoint holds other parameters (e.g. {odd}); expected this run's blocks."
            )
        for name, value in state["average"].items():
            local_tensor(self.average[name]).copy_(shard_like(value, self.average[name]))
        self.updates = int(state["updates"])


@contextlib.contextmanager
def swapped_values(live: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the tensors in `live` hold `values`; afterwards, also when something raises, what they held before.

    A plain tensor gets the other's storage; nothing is copied where dtype and device agree. A sharded one gets a copy:
    FSDP gathers from a buffer of its own, of which the parameter is only a view.

    Args:
        live: name -> plain or sharded tensor.
        values: the same names -> full tensors, or tensors sharded as those in `live`.
    """
    before = {name: local_tensor(t.detach()).clone() if isinstance(t, DTensor) else t.data for name, t in live.items()}
    try:
        for name, tensor in live.items():
            _set(tensor, shard_like(values[name], tensor))
        yield
    finally:
        for name, tensor in live.items():
            _set(tensor, before[name])


def _set(tensor: Tensor, value: Tensor) -> None:
    if isinstance(tensor, DTensor):
        local_tensor(tensor.detach()).copy_(value)
    else:
        tensor.data = value.to(device=tensor.device, dtype=tensor.dtype)
