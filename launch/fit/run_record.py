"""Further records of a fit: versions.json, and one line per epoch in the log."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from data.files import write_json
from launch.run_folder import RunFolder
from launch.versions import versions


class VersionsFile(Callback):
    """Writes `versions.json` into the run folder when a fit starts."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            write_json(RunFolder(Path(trainer.default_root_dir)).versions, versions())


class EpochLines(Callback):
    """Prints one line per epoch, which is readable in a job's log, unlike a progress bar."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        shown = [f"{key} {values[key]:.4f}" for key in ("train/loss", "val/loss") if key in values]
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {trainer.global_step}  {'  '.join(shown)}")
