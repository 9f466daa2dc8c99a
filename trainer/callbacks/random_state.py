"""Saves and restores random states, so that a resumed fit draws the same numbers as an uninterrupted one."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from trainer.checkpoint.random_state import random_state, restore_random_state

#: Key of the state in a checkpoint.
_KEY = "random_states"


class RandomStateCheckpoint(Callback):
    """Saves the state of the process's random number generators in each checkpoint; restores it when a fit resumes."""

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[_KEY] = random_state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(_KEY)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Last, since other parts of the restart draw random numbers too.
        if self._loaded is not None:
            restore_random_state(self._loaded)
            self._loaded = None
