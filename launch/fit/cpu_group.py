"""A process group of all ranks on the CPU, for small collectives that do not wait for a GPU."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from launch.fit.lightning_private import collective_timeout


class MaxReduction:
    """Handle of an asynchronous maximum over all ranks.

    Args:
        value: scalar tensor with this rank's value; the collective replaces it by the maximum.
        work: handle of the collective; None if there is only one rank.
    """

    def __init__(self, value: torch.Tensor, work: Any = None) -> None:
        self._value = value
        self._work = work

    def wait(self) -> int:
        """Waits for all ranks and returns the maximum."""
        if self._work is not None:
            self._work.wait()
        return int(self._value)


class CpuGroup:
    """A gloo group of all ranks. With one rank there is no group, and every collective returns at once.

    All ranks must call its methods in the same order.
    """

    def __init__(self) -> None:
        self._group: Any = None

    @property
    def is_open(self) -> bool:
        """Whether the group exists, that is, whether there are other ranks."""
        return self._group is not None

    def open(self, trainer: Trainer) -> None:
        """Creates the group; all ranks must call it, after the default process group exists."""
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=collective_timeout(trainer.strategy))

    def close(self) -> None:
        """Destroys the group on this rank, without waiting for the other ranks."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = None

    def start_max(self, value: int) -> MaxReduction:
        """Starts an asynchronous maximum over the values of all ranks."""
        tensor = torch.tensor(value)
        if self._group is None:
            return MaxReduction(tensor)
        return MaxReduction(tensor, dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group, async_op=True))

    def gather(self, own: Any) -> list[Any]:
        """Waits for all ranks and returns the objects of all, in the order of ranks."""
        if self._group is None:
            return [own]
        found = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, own, group=self._group)
        return found
