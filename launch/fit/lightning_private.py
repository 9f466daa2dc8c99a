"""The private parts of Lightning that Reblock uses: all of them, each with the public behaviour that is missing.

They are why pyproject.toml bounds Lightning's version. tests/unit/test_lightning_private.py finds uses elsewhere.
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
    """`trainer.precision` of a recipe (32, "bf16", None, ...) under the name that a Trainer would give it.

    Missing: the names of precisions without building a Trainer, which asks for devices.
    """
    return str(_convert_precision_to_unified_args(given) or "32-true")


def collective_timeout(strategy: Strategy) -> timedelta | None:
    """How long a rank waits for the others in a collective; None for a strategy of one rank.

    Missing: a strategy's `timeout` argument can be given to its constructor only, and not be read.
    """
    return getattr(strategy, "_timeout", None)


def set_collective_timeout(strategy: Strategy, timeout: timedelta) -> None:
    """Sets it before the process group is made, for whatever strategy the recipe names; see `collective_timeout`."""
    strategy._timeout = timeout  # type: ignore[attr-defined]  # of every strategy with more than one rank


# -- checkpoints -------------------------------------------------------------------------------------------------------


class ChosenCheckpoint(_CheckpointConnector):
    """Restores the checkpoint that `choose` returns, and no other.

    Missing: a hook between the start of the process group, before which ranks cannot tell each other which file to
    restore, and the restoring; and a way to keep Lightning, under Slurm, from restoring any hpc_ckpt_N.ckpt that lies
    in the run folder, whoever wrote it.
    """

    def choose(self, path: str | None) -> str | None:
        """The file to restore, asked on every rank.

        Args:
            path: that this rank's `Trainer.fit` was given.
        """
        return path

    @property
    def _hpc_resume_path(self) -> None:
        return None

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        super().resume_start(self.choose(checkpoint_path), weights_only=weights_only)


def use_checkpoint_connector(trainer: Trainer, connector: ChosenCheckpoint) -> None:
    """Makes a Trainer restore its checkpoint by `connector`; see `ChosenCheckpoint`."""
    trainer._checkpoint_connector = connector


class PreparedModelCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` that calls `prepare` before each of its saves.

    Missing: a hook between the decision to save, which is the same on all ranks, and the save.
    """

    def prepare(self, trainer: Trainer) -> None:
        """Called on every rank."""

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.prepare(trainer)
        super()._save_checkpoint(trainer, filepath)


# -- the training loop at the end of a batch ---------------------------------------------------------------------------
# Missing for all: a callback's `on_train_batch_end` is not told whether an optimiser step was taken, whether the epoch
# or the fit ends here, or whether a validation follows.


def accumulates(trainer: Trainer) -> bool:
    """Whether the optimiser step is still to come: this batch's gradients are added to those of the next."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def epoch_is_complete(trainer: Trainer) -> bool:
    """Whether this was the epoch's last batch."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def training_ends_here(trainer: Trainer) -> bool:
    """Whether the training loop ends after this batch: at the end of an epoch, by `max_steps` or by `should_stop`."""
    loop = trainer.fit_loop
    return loop.epoch_loop._is_training_done or (trainer.should_stop and loop._can_stop_early)


def validation_is_due(trainer: Trainer) -> bool:
    """Whether the recipe asks for a validation after this batch; one that is made because the fit stops is another."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is None or trainer._val_check_time_interval is not None:  # type: ignore[attr-defined]
        return False
    stops, trainer.should_stop = trainer.should_stop, False
    try:
        return trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = stops


def epoch_has_validation(trainer: Trainer) -> bool:
    """Whether this epoch is one that is validated, by `check_val_every_n_epoch`."""
    return trainer.fit_loop.epoch_loop._should_check_val_epoch()


# -- signals and processes ---------------------------------------------------------------------------------------------


def disable_signal_handling(trainer: Trainer) -> None:
    """Keeps Lightning from its own handling of signals.

    Missing: a switch. Lightning's handlers save or broadcast in the middle of whatever runs; they would not run, since
    the signals are blocked, but must not be found by a thread that unblocks them. Its question to rank zero before each
    batch waits for the device, and hides the failure of a rank.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def release_child_processes() -> None:
    """Lets the ranks that Lightning started in this process end with whatever status.

    Missing: a way to say that a status is no failure. Lightning kills rank zero soon after one of them has ended with
    one.
    """
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver):
            thread._child_processes = []
