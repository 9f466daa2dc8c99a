"""Writes the retrained blocks at the end of a fit."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.graft import Graft, save_graft
from trainer.module import as_retrain_blocks
from trainer.parallel.sharded_tensors import gather_full
from trainer.run_files import GRAFT


class GraftWriter(Callback):
    """Writes `graft.safetensors` into the run folder when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = as_retrain_blocks(pl_module)
        weights = {"raw": module.retrained_parameters(), "ema": module.ema.average}
        weights = gather_full(weights, keep=trainer.is_global_zero)  # collective: weights may be sharded
        if not trainer.is_global_zero:
            return
        save_graft(
            Path(trainer.default_root_dir) / GRAFT,
            Graft(
                raw=weights["raw"],
                ema=weights["ema"],
                blocks=module.blocks,
                base=module.base,
                base_fingerprint=module.base_fingerprint,
                step=trainer.global_step,
                trunk_dtype=str(module.trunk_dtype).removeprefix("torch."),
            ),
        )
