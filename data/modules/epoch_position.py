"""Where in an epoch a checkpoint was saved: by the data module's count, against what Lightning's loops make of it."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A loader that Lightning recognises as resumable; its position is kept by the data module, in one place."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes nothing."""


def position(trainer: Trainer, epoch: int) -> dict[str, Any]:
    """How many global batches of an epoch are done, of how many.

    Args:
        trainer: that fits.
        epoch: that its training loader was made for. Lightning's own number has moved on when a fit has ended, but its
            count of batches has not.
    """
    # Loaders run ahead and `ready` counts a batch that is still being worked on: `processed` alone is done.
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed  # type: ignore[attr-defined]
    cut = progress.is_last_batch and progress.current.ready == done  # also where `on_train_batch_start` ended the epoch
    return {"epoch": epoch, "batches": done, "of": done if cut else trainer.num_training_batches}


def leave_epoch(trainer: Trainer, saved: Mapping[str, Any]) -> bool:
    """Whether the epoch of a checkpoint that was just loaded is over: only then may Lightning go on with the next.

    Args:
        trainer: that has loaded it.
        saved: its `position`.

    Raises:
        ValueError: if Lightning counts the epoch as a whole one although part of it was not trained on: the checkpoint
            was saved after `max_steps`, `max_time` or a callback had stopped a fit in mid-epoch.
    """
    loop = trainer.fit_loop
    epoch = loop.epoch_progress.current
    if not loop.is_resuming or not epoch.ready == epoch.started == epoch.processed:  # type: ignore[attr-defined]
        return False
    done, of = saved["batches"], saved.get("of")
    if of is not None and done < of:
        raise ValueError(
            f"the checkpoint was saved after a fit had stopped at {done} of {of} batches of epoch {saved['epoch']}, "
            "and its rest would never be trained on; expected one that was saved at a step or after a whole epoch: "
            "the run's last.ckpt is."
        )
    # With max_steps, Lightning takes such an epoch up again, ends it twice and leaves the next one out.
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
    return True


def check_trainer(trainer: Trainer) -> None:
    """Whether a Trainer makes a loader for each epoch and leaves it as it is.

    Raises:
        ValueError: if it does not.
    """
    reload, replaced = (
        trainer.reload_dataloaders_every_n_epochs,  # type: ignore[attr-defined]
        trainer._accelerator_connector.use_distributed_sampler,
    )
    if reload != 1 or (replaced and trainer.world_size > 1):
        raise ValueError(
            f"got a Trainer with reload_dataloaders_every_n_epochs={reload}, use_distributed_sampler={replaced}; "
            "expected 1 and False: each epoch has its own order, and the data module splits it over the ranks."
        )
