"""What a fit must prove and must leave behind: frozen weights that stayed frozen, random states, the graft."""

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer import run_files, surgery
from trainer.checkpoint.io import random_states, restore_random_states
from trainer.graft import Graft, save_graft
from trainer.module import RetrainBlocks
from trainer.parallel.gathered_tensors import gathered


def write_json(path: Path, content: Any) -> None:
    """Writes JSON beside its place and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    with open(beside, "w") as file:
        json.dump(content, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _retrains(module: LightningModule) -> RetrainBlocks:
    if not isinstance(module, RetrainBlocks):
        raise ValueError(f"got a {type(module).__name__}, expected RetrainBlocks; take this callback out.")
    return module


class FrozenGuard(Callback):
    """Compares the fingerprint of the frozen weights before and after a fit; the run fails if they differ.

    Writes `fingerprint.json` into the run folder.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = _retrains(pl_module).base_fingerprint

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        after = surgery.frozen_fingerprint(_retrains(pl_module).split_model.transformer)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / run_files.FINGERPRINT
            write_json(path, {"before": self._before, "after": after, "equal": after == self._before})
        if after != self._before:
            raise RuntimeError(
                f"frozen weights changed during the fit: fingerprint {self._before[:16]}... before, {after[:16]}... "
                "after. The retrained blocks no longer belong to the base; look for code that writes to frozen weights."
            )


class RandomStates(Callback):
    """Keeps the process's random generators in the checkpoint, so that a resumed fit draws on where it stopped."""

    def __init__(self) -> None:
        self._states: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["random_states"] = random_states()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._states = checkpoint.get("random_states")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After everything else of the restart, which draws numbers of its own.
        if self._states is not None:
            restore_random_states(self._states)
            self._states = None


class GraftWriter(Callback):
    """Leaves `graft.safetensors` in the run folder when training ends."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _retrains(pl_module)
        weights = {"raw": module.retrained_parameters(), "ema": module.ema.average}
        weights = gathered(weights, keep=trainer.is_global_zero)  # by all ranks: each may hold a part only
        if not trainer.is_global_zero:
            return
        save_graft(
            Path(trainer.default_root_dir) / run_files.GRAFT,
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
