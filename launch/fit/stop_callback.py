"""Stops a fit on a signal: all ranks agree at the end of a step, save a checkpoint, and exit."""

from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info

from launch.fit import requeue
from launch.fit.cpu_group import CpuGroup, MaxReduction
from launch.fit.last_checkpoint import LastCheckpoint
from launch.fit.lightning_private import accumulates, disable_signal_handling, release_child_processes
from launch.signals import UNSAVED, SignalRequest, Stopped, requested
from trainer.callbacks.probe_callback import ProbeCallback


class StopAgreement:
    """The largest `SignalRequest` of any rank; the same on all ranks.

    All ranks must call its methods in the same order.
    """

    def __init__(self) -> None:
        self._group = CpuGroup()
        self._exchange: MaxReduction | None = None  # the collective in progress

    def open(self, trainer: Trainer) -> None:
        """Creates the group of ranks; all ranks must call it, after the default process group exists."""
        self._group.open(trainer)

    def close(self) -> None:
        """Destroys the group on this rank, without waiting for the other ranks."""
        self._group.close()
        self._exchange = None

    def now(self) -> SignalRequest:
        """Waits for all ranks and returns the largest request so far."""
        before = self._finish_exchange()
        self._start_exchange()
        return max(before, self._finish_exchange())

    def one_call_ago(self) -> SignalRequest:
        """Returns the result of the previous call, so that the collective overlaps with a training step.

        With one rank there is no collective; it returns the request so far.
        """
        if not self._group.is_open:
            return requested()
        found = self._finish_exchange()
        self._start_exchange()
        return found

    def _start_exchange(self) -> None:
        self._exchange = self._group.start_max(int(requested()))

    def _finish_exchange(self) -> SignalRequest:
        if self._exchange is None:
            return SignalRequest.NOTHING
        exchange, self._exchange = self._exchange, None
        return SignalRequest(exchange.wait())


class StopOnSignal(Checkpoint):
    """Ends a run after a signal by raising `Stopped` on all ranks at the same point.

    - In training: at the end of the optimiser step after the one in which the signal came, with a new `last.ckpt`.
    - At an epoch's last step, and before a validation: at once, without saving. `last.ckpt` is one step older.
    - In a validation or a measurement: after the current batch. `last.ckpt` is one step older, and a resumed run
      repeats the validation or measurement. (At the start of a fit, finished measurements of the stage are kept.)
    - Before training, e.g. while the base is loaded: at the next check, once all ranks have reached it.
    - After the last step's validation and measurements: never, since the fit is complete.

    `Stopped` passes through Lightning like any exception, so no end-of-epoch hooks run for the interrupted epoch.

    Args:
        last_checkpoint: callback that saves `last.ckpt`.
    """

    # A `Checkpoint`, since Lightning calls checkpoint callbacks last, in the order of the list. The state that
    # it saves must include what other callbacks log at the end of a step.

    def __init__(self, last_checkpoint: LastCheckpoint) -> None:
        self.last_checkpoint = last_checkpoint
        self.agreement = StopAgreement()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        disable_signal_handling(trainer)
        self.agreement.open(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProbeCallback):
                callback.after_batch.append(lambda: self._stop_if_requested("in a measurement"))
        self._stop_if_requested("before the base was loaded")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_requested("before training")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_requested("before training")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if accumulates(trainer) or (request := self.agreement.one_call_ago()) is SignalRequest.NOTHING:
            return
        if _reached(trainer.global_step, trainer.max_steps):
            return  # a resumed run would not make the remaining measurements and the graft
        if self.last_checkpoint.resumes_exactly(trainer) and self.last_checkpoint.saved_step != trainer.global_step:
            self.last_checkpoint.save(trainer)
        raise Stopped(request, f"after step {trainer.global_step}")

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop_if_requested("in a validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_finished(trainer):
            self._stop_if_requested(f"after epoch {trainer.current_epoch + 1}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.agreement.now()  # completes a collective in progress before the group is destroyed
        self.agreement.close()

    def _stop_if_requested(self, where: str) -> None:
        request = self.agreement.now()
        if request is not SignalRequest.NOTHING:
            raise Stopped(request, where)


def _is_finished(trainer: Trainer) -> bool:
    """Whether the epoch that has just ended is the last one."""
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return (
        trainer.should_stop
        or _reached(epochs, trainer.max_epochs or -1)
        or _reached(trainer.global_step, trainer.max_steps)
    )


def _reached(count: int, limit: int) -> bool:
    """Whether a count has reached its limit; -1 means no limit."""
    return limit != -1 and count >= limit


def end_stopped_run(stopped: Stopped) -> None:
    """Requeues the job of a stopped run if needed, after all ranks have reached this point with everything on disk.

    The order matters because Slurm kills the processes of a job that is requeued.
    """
    is_rank_zero = not dist.is_initialized() or dist.get_rank() == 0
    if is_rank_zero:
        release_child_processes()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    outcome = ""
    saved = stopped.code != UNSAVED
    resumes = stopped.request is SignalRequest.RESUME_LATER
    if is_rank_zero and saved and requeue.mode() == "self" and (resumes or requeue.preempted()):
        outcome = "; " + requeue.requeue()
    by = {SignalRequest.RESUME_LATER: "the stop signal", SignalRequest.TERMINATE: "SIGTERM"}[stopped.request]
    rank_zero_info(f"stopped by {by} {stopped.where}, exit status {stopped.code}{outcome}")
