"""Sums over the batches and ranks of a step or a validation, from which the logged figures are made."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RankSums:
    """Named sums that stay on the device; all ranks add theirs up in one all-reduce, for which no host waits.

    Lightning's `self.log(..., sync_dist=True, batch_size=n)` divides by the mean batch size over ranks, rounded down.
    `Strategy.reduce` puts a barrier before its all-reduce, in which the host waits for the device.

    Args:
        names: of the sums, in the order in which `add` takes them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._own: Tensor | None = None

    def reset(self) -> None:
        """Forgets what was added."""
        self._own = None

    def add(self, values: Tensor) -> None:
        """Adds (names,) values of a batch of this rank."""
        self._own = values.double() if self._own is None else self._own + values

    def over_ranks(self, device: torch.device | str) -> dict[str, Tensor]:
        """Name -> () float64, the sum over all ranks; begins anew. Collective: every rank calls it.

        Args:
            device: of the ranks, for one that has added nothing.
        """
        own, self._own = self._own, None
        total = torch.zeros(len(self.names), dtype=torch.float64, device=device) if own is None else own.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return dict(zip(self.names, total, strict=True))
