"""Errors of one rank that end all ranks: the others raise too, instead of waiting for it in a collective."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Trainer


class RankFailedError(RuntimeError):
    """Another rank has failed; the message names it and says why."""


@contextlib.contextmanager
def raise_on_all_ranks(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """An exception that one rank raises inside is raised on every rank: on the others as a `RankFailedError`.

    Yields `check_ranks`. Every rank calls it equally often, and right before each collective of its own. It returns
    when all ranks have called it, and raises if one has failed. The block ends with such a call; a rank that raises
    takes part in the next call of the others before it leaves the block.

    KeyboardInterrupt and SystemExit are not passed on: a job is stopped by a signal to all of its ranks. In a forward
    pass that is itself collective (sharded weights) the other ranks still wait for the one that failed, until the
    timeout of the process group.
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
