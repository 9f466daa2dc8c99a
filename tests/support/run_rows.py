"""Rows that a run has written to metrics.csv, and whether two runs are the same."""

import json
from pathlib import Path

from launch.run_folder import TIMING_COLUMNS, RunFolder

#: Steps of an epoch, and epochs, of the recipe that `write_recipe` writes: 40 samples, 8 held out, batches of 4.
STEPS, EPOCHS = 8, 3


def rows_of(run: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv: their cells that are not empty and hold no time."""
    rows = RunFolder(run).read_metrics()[1]
    return [{name: value for name, value in row.items() if value and name not in TIMING_COLUMNS} for row in rows]


def trained(run: Path) -> dict[str, dict[str, str]]:
    """Step -> its row; every step once."""
    rows = [row for row in rows_of(run) if "train/loss" in row]
    found = {row["step"]: row for row in rows}
    assert len(found) == len(rows), f"doubled: {[row['step'] for row in rows]}"
    return found


def assert_same_run(run: Path, uninterrupted: Path) -> None:
    """Steps, losses, validations, measurements and frozen weights of both runs are the same."""
    expected, got = trained(uninterrupted), trained(run)
    assert list(got) == list(expected)
    assert [row["train/loss"] for row in got.values()] == [row["train/loss"] for row in expected.values()]

    def others(folder: Path) -> list[list[tuple[str, str]]]:
        """Validation and measurements: each once, with the same figures, in whatever order of rows."""
        rows = [row for row in rows_of(folder) if "train/loss" not in row]
        return sorted(sorted(row.items()) for row in rows)

    assert others(run) == others(uninterrupted)
    frozen = json.loads((run / "fingerprint.json").read_text())
    assert frozen == json.loads((uninterrupted / "fingerprint.json").read_text())
