"""How much of the data was damaged."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import Batch


class DataFaults(Callback):
    """Logs `data/faults`: damaged samples that were passed over for the step's batch, on the first rank.

    Those of all ranks are named in `faults*.jsonl` of the run folder.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        pl_module.log("data/faults", float(batch.faults), on_step=True, batch_size=1)
