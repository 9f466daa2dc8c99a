"""How a fit stops: all ranks agree at the end of a step, the checkpoint is written there, everybody leaves."""

import threading
from typing import Any

import torch.distributed as dist
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loops.utilities import _is_max_limit_reached
from lightning.pytorch.utilities import rank_zero_info

from launch.fit import requeue
from launch.fit.last_checkpoint import LastCheckpoint
from launch.fit.stop_agreement import Agreement
from launch.signals import UNSAVED, Request, Stopped
from trainer.callbacks.probe_callback import ProbeCallback


class StopTogether(Checkpoint):
    """Ends a run that was signalled: by `Stopped`, on every rank at the same place.

    - In training: at the end of the optimiser step after the one in which the signal came. Its state is `last.ckpt`.
    - At an epoch's last step, and where a validation is due: at once. `last.ckpt` is one step older.
    - In a validation or a measurement: after the batch. `last.ckpt` is one step older; both are made anew. (Finished
      measurements of the same stage stand where a fit begins.)
    - Before training, e.g. while the base is loaded: as soon as all ranks have come so far.
    - Once the last step's validation and measurements are over: not at all; the fit is finished.

    Nothing of an epoch's end is run for the epoch that is cut: `Stopped` passes through Lightning as any exception.

    Args:
        last: writes `last.ckpt`.
    """

    # It is a `Checkpoint` because Lightning calls those after all other callbacks, in the order of their list: the
    # state that it saves must hold what the others log at the end of a step.

    def __init__(self, last: LastCheckpoint) -> None:
        self.last = last
        self.agreement = Agreement()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        _silence(trainer)
        self.agreement.open(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProbeCallback):
                callback.after_batch.append(lambda: self._end_if_asked("in a measurement"))
        self._end_if_asked("before the base was loaded")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_asked("before training")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end_if_asked("before training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loop = trainer.fit_loop.epoch_loop
        if loop._should_accumulate() or (asked := self.agreement.by_last_time()) is Request.NOTHING:
            return
        if _is_max_limit_reached(trainer.global_step, trainer.max_steps):
            return  # no checkpoint leads back to what is left: a measurement, the graft
        if self.last.exact(trainer) and self.last.saved != trainer.global_step:
            self.last.save(trainer)
        raise Stopped(asked, f"after step {trainer.global_step}")

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._end_if_asked("in a validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _finished(trainer):
            self._end_if_asked(f"after epoch {trainer.current_epoch + 1}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.agreement.now()  # a question on its way is answered before the group goes
        self.agreement.close()

    def _end_if_asked(self, where: str) -> None:
        asked = self.agreement.now()
        if asked is not Request.NOTHING:
            raise Stopped(asked, where)


def _finished(trainer: Trainer) -> bool:
    """Whether no epoch follows the one that has just ended."""
    loop = trainer.fit_loop
    return (
        trainer.should_stop
        or _is_max_limit_reached(loop.epoch_progress.current.processed, trainer.max_epochs or -1)  # type: ignore[attr-defined]
        or _is_max_limit_reached(trainer.global_step, trainer.max_steps)
    )


def _silence(trainer: Trainer) -> None:
    """Keeps Lightning from its own ways with signals.

    Its handlers save or broadcast in the middle of whatever runs; they would not run, since the signals are blocked,
    but must not be found by a thread that unblocks them. Its question to rank zero before each batch waits for the
    device, and hides the failure of a rank.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def leave(stopped: Stopped) -> None:
    """The end of a run that has stopped: the job is requeued once every rank has come here and all is on the disk.

    Slurm ends the steps of a job that is requeued.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    if leads:
        _release_launched()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    then = ""
    saved = stopped.code != UNSAVED
    if leads and saved and requeue.mode() == "self" and (stopped.request is Request.GO_ON_LATER or requeue.preempted()):
        then = "; " + requeue.requeue()
    by = {Request.GO_ON_LATER: "the stop signal", Request.END: "SIGTERM"}[stopped.request]
    rank_zero_info(f"stopped by {by} {stopped.where}, exit status {stopped.code}{then}")


def _release_launched() -> None:
    """Where Lightning started the other ranks itself, it kills rank zero soon after one of them ends with a status."""
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
