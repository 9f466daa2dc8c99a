"""`last.ckpt`: when it is saved, so that a run goes on from it exactly."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from launch.fit.lightning_private import (
    PreparedModelCheckpoint,
    accumulates,
    epoch_has_validation,
    epoch_is_complete,
    training_ends_here,
    validation_is_due,
)
from launch.fit.resume import rename_damaged
from launch.signals import UNSAVED, Stopped
from trainer.callbacks.rank_errors import raise_on_all_ranks
from trainer.checkpoint.io import BackgroundCheckpointIO
from trainer.run_files import PREVIOUS

log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Saves `last.ckpt` every so many steps, after each whole epoch, and where a fit stops in mid-epoch.

    Each state that it saves is one that Lightning goes on from exactly. These are not saved:

    - between an epoch's last step and its end: it would go on with the next epoch, and this one's validation and
      measurements would never be made;
    - after an epoch that was cut short, by `max_steps`, `max_time` or a callback: Lightning counts it as a whole one,
      and its rest would be lost. The state after its last step is kept instead;
    - before a validation in mid-epoch that is due: it would be left out. The state after it is saved instead;
    - between two batches of one optimiser step, whose gradients no checkpoint holds: a stop waits for the step.

    So nothing is saved while a validation or a measurement runs, which may take long. The step before the one that
    they follow is always saved: a run that ends in one of them takes one step again.

    Files are written while training goes on (`BackgroundCheckpointIO`); a fit that ends waits for them, and fails if
    the last state is not on the disk.

    Args:
        path: the file.
        every: optimiser steps between two saves.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        #: The step whose state this fit saved last.
        self.saved_step: int | None = None
        self._stop = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: a refused resume must not change anything in the run folder.
        if trainer.is_global_zero and trainer.ckpt_path and Path(trainer.ckpt_path).name == PREVIOUS:
            rename_damaged(self.path)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if accumulates(trainer):
            self._stop |= trainer.should_stop
            trainer.should_stop = False
            return
        trainer.should_stop |= self._stop
        if self._due(trainer) and not validation_is_due(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (
            trainer.state.fn == "fit"
            and not trainer.sanity_checking
            and self._due(trainer)
            and validation_is_due(trainer)
        ):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if epoch_is_complete(trainer):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with raise_on_all_ranks(trainer):
            _files(trainer).wait()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        try:
            _files(trainer).wait()
        except Exception as error:  # the exception that ends the fit is the one to be raised
            log.warning("%s", error)
            if isinstance(exception, Stopped):
                exception.code = UNSAVED

    def save(self, trainer: Trainer) -> None:
        """Saves the state after this step; every rank calls it."""
        make_ready(trainer)
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_step = trainer.global_step

    def resumes_exactly(self, trainer: Trainer) -> bool:
        """Whether Lightning would go on exactly from the state at the end of this training batch."""
        return not (accumulates(trainer) or epoch_is_complete(trainer) or validation_is_due(trainer))

    def _due(self, trainer: Trainer) -> bool:
        """Whether the state in mid-epoch is to be saved: it is the last one of this fit, or some steps have passed."""
        if accumulates(trainer) or epoch_is_complete(trainer):
            return False
        return training_ends_here(trainer) or trainer.global_step % self.every == 0 or _pause_follows(trainer)


class BestCheckpoints(PreparedModelCheckpoint):
    """`ModelCheckpoint` whose saves fail on all ranks or on none."""

    def prepare(self, trainer: Trainer) -> None:
        make_ready(trainer)


def make_ready(trainer: Trainer) -> None:
    """Waits until a checkpoint may be saved; where rank zero has to give up, all do.

    Alone it would leave the others in the save's barrier.
    """
    with raise_on_all_ranks(trainer):
        _files(trainer).make_ready()


def _files(trainer: Trainer) -> BackgroundCheckpointIO:
    files = trainer.strategy.checkpoint_io
    assert isinstance(files, BackgroundCheckpointIO)
    return files


def _pause_follows(trainer: Trainer) -> bool:
    """Whether the next optimiser step is followed by a validation or by the end of the epoch."""
    loop = trainer.fit_loop.epoch_loop
    done, batches = loop.batch_progress.current.ready, trainer.num_training_batches
    last = done + trainer.accumulate_grad_batches
    if last >= batches:
        return True
    every = trainer.val_check_batch
    if every is None or every == float("inf") or not epoch_has_validation(trainer):
        return False
    # Counted over the whole fit where validations do not keep to epochs.
    before = loop.total_batch_idx - loop.batch_idx if trainer.check_val_every_n_epoch is None else 0
    return any((before + batch) % every == 0 for batch in range(done + 1, last + 1))
