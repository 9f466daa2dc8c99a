"""All uses of Lightning's private attributes, each with the public API that is missing.

Because of them pyproject.toml bounds Lightning's version. tests/unit/test_lightning_private.py finds uses elsewhere.
"""

import threading
from datetime import timedelta
from typing import Any

from lightning.fabric.connector import _convert_precision_to_unified_args
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

# -- the Trainer's set-up ----------------------------------------------------------------------------------------------


def precision_name(given: Any) -> str:
    """The canonical name, such as `bf16-mixed`, of a recipe's `trainer.precision` (32, "bf16", None, ...).

    Missing: a way to get it without a Trainer, which needs the recipe's devices.
    """
    return str(_convert_precision_to_unified_args(given) or "32-true")


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """Time that a rank waits for the others in a collective; None for a strategy with one rank.

    Missing: a public attribute for the strategy's `timeout` argument.
    """
    return getattr(strategy, "_timeout", None)


def set_collective_timeout(strategy: Strategy, timeout: timedelta) -> None:
    """Sets the timeout of any strategy, before its process group is created; see `collective_timeout`."""
    strategy._timeout = timeout  # type: ignore[attr-defined]  # every strategy with several ranks has it


# -- checkpoints -------------------------------------------------------------------------------------------------------


class ChosenCheckpoint(_CheckpointConnector):
    """Restores the checkpoint that `choose` returns, and no other.

    Missing: a hook after the process group has started, so that ranks can communicate, and before the checkpoint is
    restored. Also missing: a way to keep Lightning under Slurm from restoring any hpc_ckpt_N.ckpt in the run folder.
    """

    def choose(self, path: str | None) -> str | None:
        """Returns the file to restore; called on every rank.

        Args:
            path: path that `Trainer.fit` got on this rank.
        """
        return path

    @property
    def _hpc_resume_path(self) -> None:
        return None

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        super().resume_start(self.choose(checkpoint_path), weights_only=weights_only)


def use_checkpoint_connector(trainer: Trainer, connector: ChosenCheckpoint) -> None:
    """Makes a Trainer restore its checkpoint with `connector`; see `ChosenCheckpoint`."""
    trainer._checkpoint_connector = connector


class PreparedModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that calls `prepare` before each of its saves.

    Missing: a hook between the decision to save, which all ranks make alike, and the save.
    """

    def prepare(self, trainer: Trainer) -> None:
        """Called on every rank before a save."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.prepare(trainer)
        super()._save_checkpoint(trainer, filepath)


# -- the training loop at the end of a batch ---------------------------------------------------------------------------
# Missing for all of these: `on_train_batch_end` gives no access to whether an optimiser step was taken, whether the
# epoch or the fit ends here, or whether a validation follows.


def accumulates(trainer: Trainer) -> bool:
    """Whether gradients still accumulate, so that no optimiser step was taken after this batch."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def epoch_is_complete(trainer: Trainer) -> bool:
    """Whether this was the epoch's last batch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def training_ends_here(trainer: Trainer) -> bool:
    """Whether the training loop ends after this batch: at the end of an epoch, by `max_steps` or by `should_stop`."""
    loop = trainer.fit_loop
    return loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the recipe asks for a validation after this batch; a validation because the fit stops does not count."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        return False
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stops


def epoch_has_validation(trainer: Trainer) -> bool:
    """Whether this epoch has a validation, by `check_val_every_n_epoch`."""
    return trainer.fit_loop.epoch_loop._should_check_val_epoch()


# -- signals and processes ---------------------------------------------------------------------------------------------


def disable_signal_handling(trainer: Trainer) -> None:
    """Turns off Lightning's own handling of signals.

    Missing: an option. Lightning's handlers save or broadcast in the middle of a step. The signals are blocked in the
    main thread, but another thread could unblock them. Its broadcast of SIGTERM before each batch also waits for the
    device, and hides the failure of a rank.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def release_child_processes() -> None:
    """Stops Lightning from watching the ranks that it started from this process, so that they may exit with any status.

    Missing: a set of accepted statuses. Lightning kills rank zero soon after another rank exits with a nonzero one.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
