"""Logs samples and tokens per second of all ranks."""

import time
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.batch import Batch
from trainer.module import as_retrain_blocks


class ThroughputLogger(Callback):
    """Logs `train/samples_per_s` and `train/tokens_per_s` of all ranks, by the clock of rank 0.

    Both are means over the last optimiser steps, logged once a window is full. Lightning's `Throughput` needs numbers
    on the host; the counts of all ranks are on the device, and no step waits for them.

    Args:
        window: number of step ends in a window, at least 2.

    Raises:
        ValueError: if `window` is below 2.
    """

    def __init__(self, *, window: int = 20) -> None:
        if window < 2:
            raise ValueError(f"got window {window}, expected 2 or more: a rate is taken between the ends of two steps.")
        self.window = window

    def _restart(self, trainer: Trainer) -> None:
        # Measurements and validation do not count as training time: the window restarts after them.
        self._ends: deque[tuple[float, Tensor]] = deque(maxlen=self.window)  # seconds, (samples, tokens) until then
        self._step = trainer.global_step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)  # a fit that resumes within an epoch calls no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # the step goes on with the next batch
        self._step = trainer.global_step
        counts = as_retrain_blocks(pl_module).step_counts
        taken = torch.stack([counts["samples"], counts["tokens"]])
        self._ends.append((time.perf_counter(), self._ends[-1][1] + taken if self._ends else taken))
        if len(self._ends) < self.window:
            return
        (begin, before), (end, now) = self._ends[0], self._ends[-1]
        samples, tokens = ((now - before) / (end - begin)).float()
        pl_module.log("train/samples_per_s", samples, on_step=True)
        pl_module.log("train/tokens_per_s", tokens, on_step=True)
