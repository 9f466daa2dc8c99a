"""Logs the number of damaged samples."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import Batch
from trainer.module import as_retrain_blocks


class DataFaults(Callback):
    """Logs `data/faults`: number of damaged samples that were skipped for an optimiser step, on all ranks.

    `faults*.jsonl` in the run folder list the damaged samples of all ranks.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        counts = as_retrain_blocks(pl_module).step_counts
        if counts:  # there are none while the first step accumulates
            pl_module.log("data/faults", counts["faults"].float(), on_step=True, batch_size=1)
