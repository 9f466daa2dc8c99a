"""Where a run's figures go: `metrics.csv` always, Weights & Biases offline unless its environment says otherwise."""

import csv
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from data.files import atomic_file
from launch.run_folder import RunFolder

#: Steps after which rows are written, where Lightning does not ask for it before.
_FLUSH_STEPS = 100


class MetricsFile(Logger):
    """`metrics.csv` in the run folder, continued by a resumed run; columns in alphabetical order.

    Lightning's CSVLogger deletes the file of an earlier start, and empties it before it adds a column: a process that
    was killed then would lose every row.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        self.run = run
        #: The last step whose loss was logged.
        self.last_step = -1
        self._columns: list[str] | None = None  # None: the file was not read yet
        self._rows_written = 0
        self._pending: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.run.path)

    @property
    def rows(self) -> int:
        """Rows in the file and on their way to it."""
        self._read()
        return self._rows_written + len(self._pending)

    def reopen(self) -> None:
        """Forgets what was read of the file, which `rewind` has replaced, and what was not written to it."""
        self._columns, self._pending = None, []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the resolved config is saved as config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        step = self.rows if step is None else step
        row = _without_empty_bands(metrics)
        row = {name: value.item() if isinstance(value, Tensor) else value for name, value in row.items()}
        self._pending.append(row | {"step": step})
        if "train/loss" in metrics:
            self.last_step = step
        if (step + 1) % _FLUSH_STEPS == 0:
            self.save()

    @rank_zero_only
    def save(self) -> None:
        """Appends the rows that are not in the file yet."""
        if not self._pending:
            return
        columns = self._read()
        new = {name for row in self._pending for name in row} - set(columns)
        exists = self.run.metrics.is_file()
        if new:
            columns = self._columns = sorted({*columns, *new})
            if exists:
                replace_table(self.run, columns, self.run.read_metrics()[1])
        self.run.path.mkdir(parents=True, exist_ok=True)
        with self.run.metrics.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            if not exists:
                writer.writeheader()
            writer.writerows(self._pending)
        self._rows_written += len(self._pending)
        self._pending = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _read(self) -> list[str]:
        """Columns of the file, whose rows are counted at the first call."""
        if self._columns is None:
            self._columns, rows = self.run.read_metrics()
            self._rows_written = len(rows)
        return self._columns


def replace_table(run: RunFolder, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a new metrics.csv in the place of the old one."""
    with atomic_file(run.metrics) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def _without_empty_bands(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sigma bands that had no samples: their cells stay empty."""
    return {k: v for k, v in metrics.items() if not ("_sigma_" in k and math.isnan(v))}


class MetricsPosition(Callback):
    """Saves in each checkpoint which rows of `metrics.csv` came before it: a resumed run writes the others again.

    Lightning logs a step after the hook in which that step's checkpoint is saved, so the checkpoint holds that row.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        file = next((logger for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)
        if file is None or not trainer.is_global_zero:
            return
        file.save()
        step, row = trainer.global_step - 1, {}
        if file.last_step < step:
            row = {k: float(v) for k, v in trainer.logged_metrics.items() if k.startswith(("train/", "data/"))}
            row = _without_empty_bands(row)
            row |= {"epoch": trainer.current_epoch, "step": step}
        checkpoint["metrics"] = {"rows": file.rows, "row": row}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Comes after the module has accepted the checkpoint: a refused resume must not touch the file.
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            run = RunFolder(Path(trainer.default_root_dir))
            print(f"resuming {run.path} after step {checkpoint['global_step']}")
            file = next((logger for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)
            if file is not None and "metrics" in checkpoint:
                rewind(run, checkpoint["metrics"])
                file.reopen()
            done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
            forget_measurements(run, done)


def rewind(run: RunFolder, position: Mapping[str, Any]) -> None:
    """Takes the rows out of `metrics.csv` that were written after a checkpoint was saved.

    Args:
        run: the run folder.
        position: {"rows": how many come before it, "row": the one of its own step, or empty}, as the checkpoint has it.
    """
    columns, rows = run.read_metrics()
    if columns:
        own = [position["row"]] if position["row"] else []
        replace_table(run, sorted({*columns, *position["row"]}), rows[: position["rows"]] + own)


def forget_measurements(run: RunFolder, epochs: int) -> None:
    """Removes the measurements of epochs that had not ended when a checkpoint was saved: they are made again.

    A fit that stopped in mid-epoch has measured there, under that epoch's name.

    Args:
        run: the run folder.
        epochs: that are over.
    """
    for path in run.measurements.glob("*-epoch-*.npz"):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) > epochs:
            path.unlink()


def loggers(run: RunFolder, *, wandb: bool) -> list[Logger]:
    """The run's loggers.

    Args:
        run: the run folder.
        wandb: also log to Weights & Biases. Offline unless WANDB_MODE says otherwise; project, entity and the rest come
            from its own environment variables.
    """
    found: list[Logger] = [MetricsFile(run)]
    if wandb and os.environ.get("WANDB_MODE") != "disabled":
        offline = os.environ.get("WANDB_MODE", "offline") == "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        project = os.environ.get("WANDB_PROJECT", "reblock")
        found.append(WandbLogger(name=run.path.name, save_dir=run.path, project=project, offline=offline))
    return found
