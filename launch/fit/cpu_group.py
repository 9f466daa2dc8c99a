"""All ranks as a process group on the CPU: small exchanges that never wait for a device."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from launch.fit.lightning_private import collective_timeout


class MaxReduction:
    """A maximum over all ranks that is on its way.

    Args:
        value: this rank's.
        work: the collective that replaces it by the maximum; None where there is one rank.
    """

    def __init__(self, value: torch.Tensor, work: Any = None) -> None:
        self._value = value
        self._work = work

    def wait(self) -> int:
        """The maximum, once all ranks have sent theirs."""
        if self._work is not None:
            self._work.wait()
        return int(self._value)


class CpuGroup:
    """A gloo group of all ranks; with one rank there is no group, and every exchange returns at once.

    Every rank calls its methods equally often and in the same order.
    """

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def is_open(self) -> bool:
        """Whether there are other ranks to exchange with."""
        return self._group is not None

    def open(self, trainer: Trainer) -> None:
        """Makes the group; every rank calls it once the process group stands."""
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=collective_timeout(trainer.strategy))

    def close(self) -> None:
        """Destroys this rank's end of the group; does not wait for the others."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = None

    def start_max(self, value: int) -> MaxReduction:
        """Starts the maximum of every rank's value."""
        tensor = torch.tensor(value)
        if self._group is None:
            return MaxReduction(tensor)
        return MaxReduction(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True))

    def gather(self, own: Any) -> list[Any]:
        """Every rank's object, by rank; waits for all."""
        if self._group is None:
            return [own]
        found = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, own, group=self._group)
        return found
