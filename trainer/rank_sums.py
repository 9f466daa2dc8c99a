"""Sums over the batches and ranks of a step or a validation; logged figures are computed from them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class RankSums:
    """Named sums that stay on the device; one all-reduce adds those of all ranks, without waiting for the device.

    Lightning's `self.log(..., sync_dist=True, batch_size=n)` divides by the mean batch size over ranks, rounded down.
    `Strategy.reduce` puts a barrier before its all-reduce, in which the host waits for the device.

    Args:
        names: names of the sums, in the order of the values that `add` takes.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._own: Tensor | None = None

    def reset(self) -> None:
        """Sets the sums to zero."""
        self._own = None

    def add(self, values: Tensor) -> None:
        """Adds the values of one batch of this rank, one for each name."""
        self._own = values.double() if self._own is None else self._own + values

    def over_ranks(self, device: torch.device | str) -> dict[str, Tensor]:
        """Sums over all ranks by name, each () float64, and sets the sums to zero. Collective: every rank must call it.

        Args:
            device: device of this rank, used if it has added nothing.
        """
        own, self._own = self._own, None
        total = torch.zeros(len(self.names), dtype=torch.float64, device=device) if own is None else own.clone()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        return dict(zip(self.names, total, strict=True))
