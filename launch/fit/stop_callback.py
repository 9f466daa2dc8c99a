"""How a fit stops on a signal: all ranks agree at the end of a step, save the checkpoint there, and end."""

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
    """What any rank has been asked to do by a signal, the same answer on every rank.

    Every rank calls its methods equally often and in the same order.
    """

    def __init__(self) -> None:
        self._group = CpuGroup()
        self._exchange: MaxReduction | None = None  # under way

    def open(self, trainer: Trainer) -> None:
        """Makes the group of ranks; every rank calls it once the process group stands."""
        self._group.open(trainer)

    def close(self) -> None:
        """Destroys this rank's end of the group; does not wait for the others."""
        self._group.close()
        self._exchange = None

    def now(self) -> SignalRequest:
        """What any rank has been asked by now; waits for all."""
        before = self._finish_exchange()
        self._start_exchange()
        return max(before, self._finish_exchange())

    def one_call_ago(self) -> SignalRequest:
        """What any rank had been asked when this was last called, so that the exchange runs beside a step.

        With one rank there is nothing to wait for: what it has been asked by now.
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
    """Ends a run that was signalled: by `Stopped`, on every rank at the same place.

    - In training: at the end of the optimiser step after the one in which the signal came. Its state is `last.ckpt`.
    - At an epoch's last step, and where a validation is due: at once. `last.ckpt` is one step older.
    - In a validation or a measurement: after the batch. `last.ckpt` is one step older; both are made anew. (Finished
      measurements of the same stage are kept where a fit begins.)
    - Before training, e.g. while the base is loaded: as soon as all ranks have come so far.
    - Once the last step's validation and measurements are over: not at all; the fit is finished.

    Nothing of an epoch's end is run for the epoch that is cut: `Stopped` passes through Lightning as any exception.

    Args:
        last_checkpoint: writes `last.ckpt`.
    """

    # It is a `Checkpoint` because Lightning calls those after all other callbacks, in the order of their list: the
    # state that it saves must hold what the others log at the end of a step.

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
            return  # no checkpoint leads back to what is left: a measurement, the graft
        if self.last_checkpoint.resumes_exactly(trainer) and self.last_checkpoint.saved_step != trainer.global_step:
            self.last_checkpoint.save(trainer)
        raise Stopped(request, f"after step {trainer.global_step}")

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop_if_requested("in a validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _is_finished(trainer):
            self._stop_if_requested(f"after epoch {trainer.current_epoch + 1}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.agreement.now()  # an exchange under way is finished before the group is destroyed
        self.agreement.close()

    def _stop_if_requested(self, where: str) -> None:
        request = self.agreement.now()
        if request is not SignalRequest.NOTHING:
            raise Stopped(request, where)


def _is_finished(trainer: Trainer) -> bool:
    """Whether no epoch follows the one that has just ended."""
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return (
        trainer.should_stop
        or _reached(epochs, trainer.max_epochs or -1)
        or _reached(trainer.global_step, trainer.max_steps)
    )


def _reached(count: int, limit: int) -> bool:
    """Whether a count has come to its limit; -1 is none."""
    return limit != -1 and count >= limit


def end_stopped_run(stopped: Stopped) -> None:
    """The end of a run that has stopped: the job is requeued once every rank has come here and all is on the disk.

    Slurm ends the steps of a job that is requeued.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    if leads:
        release_child_processes()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    then = ""
    saved = stopped.code != UNSAVED
    resumes = stopped.request is SignalRequest.RESUME_LATER
    if leads and saved and requeue.mode() == "self" and (resumes or requeue.preempted()):
        then = "; " + requeue.requeue()
    by = {SignalRequest.RESUME_LATER: "the stop signal", SignalRequest.TERMINATE: "SIGTERM"}[stopped.request]
    rank_zero_info(f"stopped by {by} {stopped.where}, exit status {stopped.code}{then}")
