"""metrics.csv: what is left out of a row."""

import math
from pathlib import Path

from launch.fit.metrics_csv import MetricsFile
from launch.run_folder import RunFolder


def test_only_bands_of_training_without_samples_are_left_out(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    table = MetricsFile(run)
    table.log_metrics({"train/loss": 0.5, "train/loss_sigma_0.00-0.25": math.nan, "train/loss_sigma_0.25-0.50": 0.5}, 0)
    table.log_metrics({"val/loss": math.nan, "val/loss_sigma_0.125": math.nan}, 1)
    table.save()
    columns, rows = run.read_metrics()
    assert "train/loss_sigma_0.00-0.25" not in columns
    assert rows[1]["val/loss_sigma_0.125"] == rows[1]["val/loss"] == "nan"
