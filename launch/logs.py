"""Where a run's figures go: `metrics.csv` always, Weights & Biases offline unless its own environment says otherwise."""

import csv
import os
from pathlib import Path

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger


class _KeepingWriter(_ExperimentWriter):
    """Lightning's writer deletes the file of an earlier start; a resumed run's figures must stay."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])

    def log_hparams(self, params: dict) -> None:
        """The resolved config is saved as config.yaml already."""


class MetricsFile(CSVLogger):
    """`metrics.csv` in the run folder, continued by a resumed run."""

    def __init__(self, run: Path, flush_every: int = 20) -> None:
        super().__init__(run, name="", version="", flush_logs_every_n_steps=flush_every)

    @property
    def experiment(self) -> _ExperimentWriter:
        if self._experiment is None:
            self._experiment = _KeepingWriter(log_dir=self.log_dir)
        return self._experiment


def forget_after(run: Path, step: int) -> None:
    """Drops the rows of `metrics.csv` from `step` on: a resumed run takes these steps again."""
    path = run / "metrics.csv"
    if not path.is_file():
        return
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        keys, rows = list(reader.fieldnames or []), [row for row in reader if row["step"] and int(row["step"]) < step]
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=keys)
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def loggers(run: Path, *, wandb: bool) -> list[Logger]:
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
        found.append(WandbLogger(name=run.name, save_dir=run, project=project, offline=offline))
    return found
