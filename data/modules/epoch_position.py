"""Where in an epoch a checkpoint was saved: the data module's count, compared with what Lightning's loops restore.

The only module of `data` that touches Lightning's private attributes; Lightning has no public way to
- take back that a loop restarts (`_Loop.restarting`, needed in `finish_epoch`),
- ask whether it replaces samplers (`Trainer._accelerator_connector.use_distributed_sampler`).
"""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop
from torch.utils.data import DataLoader


class ResumableLoader(DataLoader):
    """A loader that Lightning recognises as resumable; the data module alone saves its position."""

    def state_dict(self) -> dict[str, Any]:
        """An empty state."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignores the state."""


def training_position(trainer: Trainer, epoch: int) -> dict[str, Any]:
    """The global batches of an epoch that are trained on, and how many the epoch has.

    Args:
        trainer: that fits.
        epoch: that its training loader was made for. When a fit has ended, Lightning's own number has moved on, but its
            count of batches has not.
    """
    # Loaders run ahead and `ready` counts a batch that is still being worked on: only `processed` is done.
    progress = trainer.fit_loop.epoch_loop.batch_progress
    done = progress.current.processed  # type: ignore[attr-defined]
    # Also where `on_train_batch_start` ended the epoch.
    complete = progress.is_last_batch and progress.current.ready == done
    return {"epoch": epoch, "batches": done, "of": done if complete else trainer.num_training_batches}


def finish_epoch(trainer: Trainer, saved: Mapping[str, Any]) -> bool:
    """Lets Lightning go on with the next epoch if that of the checkpoint is over; returns whether it is.

    Args:
        trainer: that has just loaded the checkpoint.
        saved: the checkpoint's `training_position`.

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
    # With max_steps, Lightning would restart such an epoch, end it twice and leave the next one out. The property of
    # the fit loop itself ignores what it is set to then, so that of its base class is set.
    _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]
    return True


def check_trainer(trainer: Trainer) -> None:
    """Checks that a Trainer makes a new loader for each epoch and does not replace its sampler.

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
