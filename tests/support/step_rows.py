"""Callbacks for fits on several ranks: one writes down each optimiser step, one spoils a batch, one is a clock."""

import json
from pathlib import Path
from types import SimpleNamespace

from lightning.pytorch import Callback

from trainer.callbacks import throughput


class Steps(Callback):
    """`steps.jsonl` in the run folder: loss over the global batch, gradient norm, averaging updates, skipped steps."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")
        if trainer.is_global_zero and "train/grad_norm" in trainer.callback_metrics:
            norm = float(trainer.callback_metrics["train/grad_norm"])
            line = {"step": trainer.global_step, "batch": batch_idx, "loss": float(loss), "norm": norm}
            line |= {"updates": pl_module.ema.updates, "skipped": pl_module.skipped}
            with (Path(trainer.default_root_dir) / "steps.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")


class Spoil(Callback):
    """Makes one batch of the last rank not finite."""

    def __init__(self, batch: int):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch and trainer.global_rank == trainer.world_size - 1:
            batch.latents.fill_(float("nan"))


class StepClock(Callback):
    """A second for each optimiser step: rates are then what steps take, whatever the machine does beside."""

    def setup(self, trainer, pl_module, stage):
        throughput.time = SimpleNamespace(perf_counter=lambda: float(trainer.global_step))
