"""Logs the number of damaged samples."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import Batch


class DataFaults(Callback):
    """Logs `data/faults`: number of damaged samples that rank 0 skipped while it collected the step's batch.

    `faults*.jsonl` in the run folder list the damaged samples of all ranks.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        pl_module.log("data/faults", float(batch.faults), on_step=True, batch_size=1)
