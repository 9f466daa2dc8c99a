"""A resumed fit draws the random numbers that come next."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.checkpoint.random_state import random_state, restore_random_state

#: Where a checkpoint holds the state.
_KEY = "random_states"


class RandomStateCheckpoint(Callback):
    """Saves the state of the process's random generators in each checkpoint, and restores it when a fit resumes."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = random_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(_KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After everything else of the restart, which draws numbers of its own.
        if self._loaded is not None:
            restore_random_state(self._loaded)
            self._loaded = None
