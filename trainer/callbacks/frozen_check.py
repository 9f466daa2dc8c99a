"""Checks that a fit does not change the frozen weights."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from data.files import write_json
from trainer.module import as_retrain_blocks
from trainer.run_files import FINGERPRINT
from trainer.surgery import frozen_fingerprint


class FrozenCheck(Callback):
    """Compares the fingerprint of the frozen weights before and after a fit; the fit fails if they differ.

    Writes `fingerprint.json` into the run folder.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = as_retrain_blocks(pl_module).base_fingerprint

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = frozen_fingerprint(as_retrain_blocks(pl_module).split_model.transformer)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / FINGERPRINT
            write_json(path, {"before": self._before, "after": after, "equal": after == self._before})
        if after != self._before:
            raise RuntimeError(
                f"frozen weights changed during the fit: fingerprint {self._before[:16]}... before, {after[:16]}... "
                "after. The retrained blocks no longer belong to the base; look for code that writes to frozen weights."
            )
