"""Saves `last.ckpt` at those steps from which a run can resume exactly."""

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
    """Saves `last.ckpt` at regular steps, after each complete epoch, and where a fit stops within an epoch.

    It saves only states from which Lightning resumes exactly. It does not save:

    - between an epoch's last step and its end. A resumed run would start the next epoch, and skip this one's
      validation and measurements;
    - after an epoch that `max_steps`, `max_time` or a callback cut short. Lightning would count it as complete and skip
      the rest. The state after its last step is saved instead;
    - before a validation that is due within an epoch. It would be skipped. The state after it is saved instead;
    - between two batches of one optimiser step, since a checkpoint holds no gradients. A stop waits for the step.

    So nothing is saved during a validation or a measurement, which may take long. The state one step before the step
    that they follow is always saved, so a run that ends in one of them repeats one step.

    Files are written while training continues (`BackgroundCheckpointIO`). At its end a fit waits for them, and fails
    if the last state is not on disk.

    Args:
        path: path of `last.ckpt`.
        every: number of optimiser steps between two saves.
    """

    def __init__(self, path: Path, every: int) -> None:
        self.path = path
        self.every = every
        #: The step whose state this fit saved last.
        self.saved_step: int | None = None
        self._stop = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier, since a refused resume must not change anything in the run folder.
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
        except Exception as error:  # only logged: the exception that ended the fit must propagate
            log.warning("%s", error)
            if isinstance(exception, Stopped):
                exception.code = UNSAVED

    def save(self, trainer: Trainer) -> None:
        """Saves the state after this step; all ranks must call it."""
        make_ready(trainer)
        trainer.save_checkpoint(self.path, weights_only=False)
        self.saved_step = trainer.global_step

    def resumes_exactly(self, trainer: Trainer) -> bool:
        """Whether Lightning would resume exactly from the state at the end of this training batch."""
        return not (accumulates(trainer) or epoch_is_complete(trainer) or validation_is_due(trainer))

    def _due(self, trainer: Trainer) -> bool:
        """Whether to save here, within an epoch: at regular steps, at the fit's end, or before a pause."""
        if accumulates(trainer) or epoch_is_complete(trainer):
            return False
        return training_ends_here(trainer) or trainer.global_step % self.every == 0 or _pause_follows(trainer)


class BestCheckpoints(PreparedModelCheckpoint):
    """`ModelCheckpoint` whose saves fail on all ranks or on none."""

    def prepare(self, trainer: Trainer) -> None:
        make_ready(trainer)


def make_ready(trainer: Trainer) -> None:
    """Waits until a checkpoint can be saved. If that fails on one rank, all ranks raise, none waits in the barrier."""
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
    # Without check_val_every_n_epoch, val_check_batch counts batches over the whole fit.
    before = loop.total_batch_idx - loop.batch_idx if trainer.check_val_every_n_epoch is None else 0
    return any((before + batch) % every == 0 for batch in range(done + 1, last + 1))
