"""One rank of a fit with steps of a few milliseconds, under what steers a run: signals, watchdog, checkpoints.

Run as a script: `stepping_fits.py SHARDS FOLDER STEPS WATCHDOG TIMEOUT FAULT`.
FAULT is what rank 1 does: `nothing`, `sleep` (in its sixth batch), `lock` (sleeps, and keeps the interpreter's lock:
after 1.5 s of steps, since the watchdog's timer is four times as long until it has seen the first step).
"""

import ctypes
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy

from data.modules.latents import LatentDataModule
from launch import signals
from launch.fit.last_checkpoint import LastCheckpoint
from launch.fit.metrics_csv import MetricsFile, MetricsPosition
from launch.fit.stop_callback import StopOnSignal
from launch.fit.watchdog import Watchdog
from launch.run_folder import RunFolder
from trainer.callbacks.random_state import RandomStateCheckpoint
from trainer.checkpoint.io import BackgroundCheckpointIO


class Steps(LightningModule):
    """Steps of a few milliseconds whose losses depend on all before them, and on the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 8))

    def training_step(self, batch, batch_idx):
        drawn = torch.rand(8) + batch.latents.float().mean() / 100
        loss = (self.weight @ drawn - 1).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", self.weight.square().sum() + batch.latents.float().mean(), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def build(
    shards: str,
    folder: Path,
    *,
    steps: int,
    accumulate: int = 1,
    callbacks: Sequence[Callback] = (),
    timeout: float = 60.0,
) -> tuple[Trainer, LatentDataModule, StopOnSignal]:
    """Two ranks; epochs of 40 batches with a validation each."""
    seed_everything(0, verbose=False)
    last = LastCheckpoint(RunFolder(folder).last_checkpoint, 50)
    stop = StopOnSignal(last)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy=DDPStrategy(timeout=timedelta(seconds=timeout)), max_steps=steps,
        max_epochs=-1, default_root_dir=folder, logger=MetricsFile(RunFolder(folder)),
        callbacks=[*callbacks, RandomStateCheckpoint(), MetricsPosition(), last, stop],
        plugins=[BackgroundCheckpointIO()],
        use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1, num_sanity_val_steps=0,
        log_every_n_steps=1, enable_progress_bar=False, enable_model_summary=False,
        accumulate_grad_batches=accumulate,
    )  # fmt: skip
    return trainer, LatentDataModule(shards=shards, val_samples=8, batch_size=2, val_batch_size=2, passes=5), stop


def losses(folder: Path) -> list[tuple[str, str]]:
    """(step, loss) as written."""
    return [(row["step"], row["train/loss"]) for row in RunFolder(folder).read_metrics()[1] if row["train/loss"]]


class Fault(Callback):
    """What happens to rank 1 in one of its batches."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_rank == 1:
            if self.kind == "sleep" and batch_idx == 5:
                time.sleep(3600)
            if self.kind == "lock" and batch_idx == 15:
                ctypes.PyDLL(None).sleep(3600)


class Pace(Callback):
    """Steps of a tenth of a second, told: for faults that come from outside."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print("step", trainer.global_step, flush=True)
        time.sleep(0.1)


def main(shards: str, folder: Path, steps: int, watchdog: float, timeout: float, fault: str) -> None:
    signals.block_signals("fit")
    torch.set_num_threads(1)
    callbacks = [Watchdog(RunFolder(folder), watchdog), Fault(fault), *([] if fault == "sleep" else [Pace()])]
    trainer, data, _ = build(shards, folder, steps=steps, callbacks=callbacks, timeout=timeout)
    trainer.fit(Steps(), datamodule=data)
    torch.distributed.destroy_process_group()
    print("finished", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), float(sys.argv[5]), sys.argv[6])
