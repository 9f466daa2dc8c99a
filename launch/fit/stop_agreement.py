"""What all ranks must know together: whether one has been asked to stop."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer

from launch.signals import Request, requested


class Agreement:
    """The ranks' requests as one, over a gloo group of its own on the CPU: a device is never waited for.

    Every rank calls its methods equally often and in the same order.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._told: tuple[torch.Tensor, Any] | None = None  # on its way to the others

    def open(self, trainer: Trainer) -> None:
        """Makes the group; every rank calls it once the process group stands."""
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))

    def close(self) -> None:
        """Leaves the group, without the others."""
        if self._group is not None:
            dist.destroy_process_group(self._group)
        self._group = self._told = None

    def now(self) -> Request:
        """What any rank has been asked to do; waits for all."""
        if self._group is None:
            return requested()
        before = self._heard()
        self._tell()
        return max(before, self._heard())

    def by_last_time(self) -> Request:
        """What any rank had been asked when this was last called, so that the exchange runs beside a step."""
        if self._group is None:
            return requested()
        heard = self._heard()
        self._tell()
        return heard

    def gather(self, own: Any) -> list[Any]:
        """Every rank's object, by rank."""
        if self._group is None:
            return [own]
        found = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, own, group=self._group)
        return found

    def _tell(self) -> None:
        told = torch.tensor(int(requested()))
        self._told = told, dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _heard(self) -> Request:
        if self._told is None:
            return Request.NOTHING
        (told, work), self._told = self._told, None
        work.wait()
        return Request(int(told))
