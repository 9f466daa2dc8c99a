"""Callbacks that a recipe can name: they kill their own process, or fill the disk, at a moment of a fit."""

import io
import os
import shutil
import signal
import threading
from pathlib import Path

import torch
from lightning.pytorch import Callback
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from trainer.callbacks.sinks import SinkFrequency


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(Callback):
    """SIGKILL to its own process, as REBLOCK_TEST_KILL says: MOMENT:RANK:STEP, RANK * for all."""

    def on_train_start(self, trainer, module):
        moment, rank, step = os.environ.get("REBLOCK_TEST_KILL", "never:-1:0").split(":")
        if rank not in ("*", str(trainer.global_rank)):
            return
        self.moment, self.step = moment, int(step)
        getattr(self, "_" + moment.replace("-", "_"), lambda trainer: None)(trainer)

    def on_before_backward(self, trainer, module, loss):
        if getattr(self, "moment", None) == "step" and trainer.global_step == self.step:
            die()

    def _all_reduce(self, trainer):
        def hook(state, bucket):
            if trainer.global_step == self.step:
                die()
            return allreduce_hook(state, bucket)

        trainer.strategy.model.register_comm_hook(None, hook)

    def _write(self, trainer):
        """Half of a checkpoint's bytes are on the disk."""
        save = torch.save

        def half(content, file):
            if content["global_step"] < self.step:
                return save(content, file)
            whole = io.BytesIO()
            save(content, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()

        torch.save = half

    def _measurement(self, trainer):
        observe = SinkFrequency.observe

        def killed(callback, module, probes):
            if trainer.global_step >= self.step:
                die()
            return observe(callback, module, probes)

        SinkFrequency.observe = killed


class Gate(Callback):
    """Holds every rank before the steps that are named, until the file `open-STEP` is in the folder.

    A rank that waits has made `waits-STEP-RANK`: what is to happen to a run happens where it is meant to.
    """

    def __init__(self, folder: str, steps: list[int]) -> None:
        self.folder, self.steps = Path(folder), steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        step, pause = trainer.global_step, threading.Event()
        if step in self.steps:
            (self.folder / f"waits-{step}-{trainer.global_rank}").touch()
            while not (self.folder / f"open-{step}").exists():
                pause.wait(0.01)


class DiskFiller(Callback):
    """Fills the run folder's disk but for a little at step `full`, and makes room again at step `free`."""

    def __init__(self, full: int, free: int, leave: int) -> None:
        self.full, self.free, self.leave = full, free, leave

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        path = Path(trainer.default_root_dir).parent / "filler"
        if trainer.global_step == self.full:
            path.write_bytes(bytes(shutil.disk_usage(path.parent).free - self.leave))
        if trainer.global_step == self.free:
            path.unlink(missing_ok=True)
