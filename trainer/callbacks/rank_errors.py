"""Raises the error of one rank on all ranks, so that the others do not wait for it in a collective."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Trainer


class RankFailedError(RuntimeError):
    """Another rank has failed; the message names it and says why."""


@contextlib.contextmanager
def raise_on_all_ranks(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """If one rank raises an exception in this context, raises `RankFailedError` on all other ranks.

    Yields `check_ranks`. Every rank must call it equally often, and right before each of its own collectives. The call
    returns once all ranks have made it, and raises if one of them has failed. It is also made at the end of the
    context. A rank that raises takes part in the next call of the others before it leaves the context.

    KeyboardInterrupt and SystemExit are not passed on, since a signal that stops a job goes to all ranks. If a rank
    fails in a forward pass with sharded weights, the others wait in a collective until the process group's timeout.
    """

    def exchange(error: Exception | None) -> None:
        if trainer.world_size == 1:
            return
        own = trainer.world_size if error is None else trainer.global_rank
        lowest = torch.tensor(own, device=trainer.strategy.root_device)
        failed = int(trainer.strategy.reduce(lowest, reduce_op="min"))
        if failed == trainer.world_size:
            return
        message = trainer.strategy.broadcast(f"{type(error).__name__}: {error}", src=failed)
        if error is None:
            raise RankFailedError(f"rank {failed} failed, so all ranks stop. Its message: {message}")
        error.add_note(f"on rank {trainer.global_rank} of {trainer.world_size}")

    def check_ranks() -> None:
        exchange(None)

    try:
        yield check_ranks
    except RankFailedError:
        raise
    except Exception as error:
        exchange(error)
        raise
    check_ranks()
