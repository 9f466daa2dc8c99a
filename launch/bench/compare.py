"""Two runs of one recipe, step by step and byte by byte: what a disturbance has changed."""

import csv
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from launch.bench.trace import read_trace

#: Columns of metrics.csv that differ though nothing is wrong.
_CLOCK = ("train/samples_per_s", "train/tokens_per_s")


@dataclass
class Comparison:
    """What differs between two runs: steps of all ranks that were taken, taken again, taken otherwise, never taken."""

    steps: int = 0
    again: int = 0
    otherwise: list[tuple[int, int]] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 0
    files: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """One line for each kind of difference."""
        found = {
            "samples, sigma, noise or losses differ in (rank, step)": self.otherwise,
            "never taken: (rank, step)": self.lost,
            "rows of metrics.csv that differ": self.rows,
            "files that differ, or are there in one run only": self.files,
        }
        return [f"{what}: {value}" for what, value in found.items() if value]


def compare(whole: Path, killed: Path, ranks: int) -> Comparison:
    """Each step that the killed run took, those taken again too, with the undisturbed run's; and all that it left."""
    found = Comparison()
    for rank, (wanted, got) in enumerate(zip(read_trace(whole, ranks), read_trace(killed, ranks), strict=True)):
        by_step = {line["step"]: line for line in wanted}
        taken = {line["step"] for line in got}
        found.steps += len(got)
        found.again += len(got) - len(taken)
        found.otherwise += [(rank, line["step"]) for line in got if line != by_step.get(line["step"])]
        found.lost += [(rank, step) for step in by_step if step not in taken]
    rows, others = Counter(table_rows(whole)), Counter(table_rows(killed))
    found.rows = (rows - others).total() + (others - rows).total()
    found.files += (
        ["fingerprint.json"] if len({(r / "fingerprint.json").read_bytes() for r in (whole, killed)}) > 1 else []
    )
    found.files += ["graft.safetensors"] if _graft(whole) != _graft(killed) else []
    found.files += sorted(_files(whole) ^ _files(killed))
    return found


def table_rows(run: Path) -> list[tuple[tuple[str, str], ...]]:
    """Rows of metrics.csv, whose order may differ."""
    with (run / "metrics.csv").open(newline="") as file:
        return [tuple(sorted((k, v) for k, v in row.items() if v and k not in _CLOCK)) for row in csv.DictReader(file)]


def _graft(run: Path) -> dict[str, Any]:
    """Every byte of a run's result; the file's own bytes differ, since its header has no order."""
    with safe_open(run / "graft.safetensors", "np") as file:
        return file.metadata() | {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
