"""Where a run's figures go: `metrics.csv` always, Weights & Biases offline unless its environment says otherwise."""

import csv
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from launch.run_folder import RunFolder


class _KeepingWriter(_ExperimentWriter):
    """Lightning's writer deletes the file of an earlier start; a resumed run's figures must stay."""

    def _check_log_dir_exists(self) -> None:
        self.metrics_keys = RunFolder(Path(self.log_dir)).read_metrics()[0]

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        # Lightning's empties the file first: a process that is killed then would lose every row.
        path = Path(self.metrics_file_path)
        _replace_rows(path, fieldnames, RunFolder(Path(self.log_dir)).read_metrics()[1])

    def log_hparams(self, params: dict) -> None:
        """The resolved config is saved as config.yaml already."""


def _replace_rows(path: Path, keys: list[str], rows: list[dict[str, Any]]) -> None:
    """Writes the table beside its place and renames it."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _without_empty_bands(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without the sigma bands that had no samples: their cells stay empty."""
    return {k: v for k, v in metrics.items() if not ("_sigma_" in k and math.isnan(v))}


class MetricsFile(CSVLogger):
    """`metrics.csv` in the run folder, continued by a resumed run."""

    def __init__(self, run: RunFolder) -> None:
        super().__init__(run.path, name="", version="")
        #: Rows in the file and on their way to it; counted at the first use, and anew after `rewind`.
        self.rows = 0
        #: The last step whose loss was logged.
        self.last_step = -1

    @property
    def experiment(self) -> _ExperimentWriter:
        if self._experiment is None:
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
            self.rows = len(RunFolder(Path(self.log_dir)).read_metrics()[1])
        return self._experiment

    def reopen(self) -> None:
        """Forgets what was read of the file, which `rewind` has replaced."""
        self._experiment = None
        assert self.experiment is not None  # read it now, so that `rows` is right before the next row is logged

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        super().log_metrics(_without_empty_bands(metrics), step)
        self.rows += 1
        if "train/loss" in metrics and step is not None:
            self.last_step = step


class MetricsPosition(Callback):
    """Keeps in each checkpoint which rows of `metrics.csv` came before it: a resumed run writes the others again.

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
    """Brings `metrics.csv` back to where a checkpoint was saved.

    Args:
        run: the run folder.
        position: {"rows": how many come before it, "row": the one of its own step, or empty}.
    """
    keys, rows = run.read_metrics()
    if keys:
        own = [position["row"]] if position["row"] else []
        _replace_rows(run.metrics, sorted({*keys, *position["row"]}), rows[: position["rows"]] + own)


def forget_measurements(run: RunFolder, epochs: int) -> None:
    """Removes the measurements of epochs that a checkpoint has not seen the end of: they are made again.

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
