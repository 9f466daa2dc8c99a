"""Loggers of a run: `metrics.csv`, and Weights & Biases, which is offline unless WANDB_MODE says otherwise."""

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

#: Largest number of steps between two writes; Lightning may ask for more writes.
_FLUSH_STEPS = 100


class MetricsFile(Logger):
    """Logger for `metrics.csv` in the run folder. A resumed run continues the file; columns are sorted by name.

    Lightning's CSVLogger deletes the file of an earlier start, and truncates the file to add a column. A process that
    is killed at that moment loses every row.

    Args:
        run: the run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        super().__init__()
        self.run = run
        #: The last step whose loss was logged.
        self.last_step = -1
        self._columns: list[str] | None = None  # None until the file is read
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
        """Number of rows, both written and pending."""
        self._read()
        return self._rows_written + len(self._pending)

    def reopen(self) -> None:
        """Discards pending rows and everything read from the file; call it after `rewind` has replaced the file."""
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
        """Appends the pending rows to the file."""
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
        """Columns of the file; the first call also counts its rows."""
        if self._columns is None:
            self._columns, rows = self.run.read_metrics()
            self._rows_written = len(rows)
        return self._columns


def replace_table(run: RunFolder, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Replaces metrics.csv atomically."""
    with atomic_file(run.metrics) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def _without_empty_bands(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out training's sigma bands without samples, so that their cells stay empty.

    Validation has samples at each of its sigmas, so NaN there is a loss.
    """
    return {k: v for k, v in metrics.items() if not (k.startswith("train/loss_sigma_") and math.isnan(v))}


class MetricsPosition(Callback):
    """Saves in each checkpoint the number of earlier rows of `metrics.csv`, so that a resumed run drops later ones.

    Lightning logs a step only after it has saved that step's checkpoint, so the checkpoint also holds that step's row.
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
        # Lightning calls this after the module has accepted the checkpoint; a refused resume must not touch the file.
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
    """Removes the rows of `metrics.csv` that are later than a checkpoint.

    Args:
        run: the run folder.
        position: "metrics" of the checkpoint: "rows", number of rows before it, and "row", its own row or empty.
    """
    columns, rows = run.read_metrics()
    if columns:
        own = [position["row"]] if position["row"] else []
        replace_table(run, sorted({*columns, *position["row"]}), rows[: position["rows"]] + own)


def forget_measurements(run: RunFolder, epochs: int) -> None:
    """Removes measurements of epochs that were not complete at a checkpoint, so that they are measured again.

    A fit that stops within an epoch measures at that point, and stores the result under the epoch's name.

    Args:
        run: the run folder.
        epochs: number of epochs that are complete at the checkpoint.
    """
    for path in run.measurements.glob("*-epoch-*.npz"):
        number = path.stem.rpartition("-")[2]
        if number.isdigit() and int(number) > epochs:
            path.unlink()


def loggers(run: RunFolder, *, wandb: bool) -> list[Logger]:
    """Creates the run's loggers.

    Args:
        run: the run folder.
        wandb: whether to log to Weights & Biases too, offline unless WANDB_MODE says otherwise. Its own environment
            variables set project, entity and other options.
    """
    found: list[Logger] = [MetricsFile(run)]
    if wandb and os.environ.get("WANDB_MODE") != "disabled":
        offline = os.environ.get("WANDB_MODE", "offline") == "offline"
        os.environ.setdefault("WANDB_SILENT", "true")
        project = os.environ.get("WANDB_PROJECT", "reblock")
        found.append(WandbLogger(name=run.path.name, save_dir=run.path, project=project, offline=offline))
    return found
