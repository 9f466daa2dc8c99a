"""A callback that a recipe can name: which samples each step saw, written down as it goes."""

import json
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from data.batch import Batch


class Visits(Callback):
    """Appends a line per training batch to `visits.jsonl` in the run folder: global step, epoch, batch, uids."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        line = [trainer.global_step, trainer.current_epoch, batch_idx, list(batch.uids)]
        with (Path(trainer.default_root_dir) / "visits.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
