"""Logs samples and tokens per second of all ranks."""

import time
from typing import Any

from lightning.fabric.utilities.throughput import Throughput
from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import Batch
from trainer.models.mochi import SplitModel


def tokens_of(batch: Batch, patch: int) -> int:
    """Number of tokens of a batch that pass through the blocks: vision tokens and valid text tokens."""
    _, frames, height, width = batch.latents.shape[1:]
    return len(batch) * frames * (height // patch) * (width // patch) + sum(batch.text_lengths)


class ThroughputLogger(Callback):
    """Logs `train/samples_per_s` and `train/tokens_per_s` of all ranks: means over the last steps.

    Args:
        window: number of steps that the means are taken over.
    """

    def __init__(self, *, window: int = 20) -> None:
        self.window = window

    def _restart(self) -> None:
        # Measurements and validation do not count as training time: the window restarts after them.
        self._counts = Throughput(window_size=self.window)
        self._start = time.perf_counter()
        self._batches = self._samples = self._tokens = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()  # a fit that resumes within an epoch calls no on_train_epoch_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        split_model = pl_module.split_model
        assert isinstance(split_model, SplitModel)
        self._batches += 1
        self._samples += len(batch)
        self._tokens += tokens_of(batch, split_model.transformer.config.patch_size)
        self._counts.update(
            time=time.perf_counter() - self._start, batches=self._batches, samples=self._samples, lengths=self._tokens
        )
        rates = self._counts.compute()
        if "device/samples_per_sec" in rates:
            pl_module.log("train/samples_per_s", rates["device/samples_per_sec"] * trainer.world_size, on_step=True)
            pl_module.log("train/tokens_per_s", rates["device/items_per_sec"] * trainer.world_size, on_step=True)
