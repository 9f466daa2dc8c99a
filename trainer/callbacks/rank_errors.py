"""Work that all ranks do together: where one fails, all fail soon, instead of waiting for it in a collective."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import Trainer


class RankFailed(RuntimeError):
    """Another rank has failed; the message names it and says why."""


@contextlib.contextmanager
def together(trainer: Trainer) -> Iterator[Callable[[], None]]:
    """Inside, what raises on one rank raises on every rank: there it is a `RankFailed` with the first one's message.

    Yields `agree`, which every rank calls equally often, and right before every collective of its own: it returns
    where all ranks have come so far, and raises where one has failed. A rank that raises does the exchange of the next
    `agree` for itself, and leaving the block is an `agree` too. Interrupts (KeyboardInterrupt, SystemExit) are not
    told: whoever sends them sends them to all. A forward pass that is itself collective (sharded weights) still waits
    for the rank that left it, until the process group's timeout.
    """

    def exchange(error: Exception | None) -> None:
        if trainer.world_size == 1:
            return
        own = trainer.world_size if error is None else trainer.global_rank
        told = torch.tensor(own, device=trainer.strategy.root_device)
        first = int(trainer.strategy.reduce(told, reduce_op="min"))
        if first == trainer.world_size:
            return
        message = trainer.strategy.broadcast(f"{type(error).__name__}: {error}", src=first)
        if error is None:
            raise RankFailed(f"rank {first} failed, so all ranks stop. Its message: {message}")
        error.add_note(f"on rank {trainer.global_rank} of {trainer.world_size}")

    def agree() -> None:
        exchange(None)

    try:
        yield agree
    except RankFailed:
        raise
    except Exception as error:
        exchange(error)
        raise
    agree()
