"""Compares two runs of one recipe, step by step and byte by byte: what has a disturbance changed?"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open

from launch.run_folder import TIMING_COLUMNS, RunFolder
from tests.kills.step_trace import read_traces


@dataclass
class Comparison:
    """Differences between a run and an undisturbed one.

    Args:
        steps: steps that the run has taken, summed over ranks; a repeated step counts each time.
        repeated: steps that it has taken more than once.
        different: (rank, step) whose samples, sigma, noise or losses differ.
        lost: (rank, step) that it has never taken.
        rows: rows of metrics.csv that only one of the two runs has.
        files: names of files whose content differs, or that only one of the two runs has.
    """

    steps: int = 0
    repeated: int = 0
    different: list[tuple[int, int]] = field(default_factory=list)
    lost: list[tuple[int, int]] = field(default_factory=list)
    rows: int = 0
    files: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """One line for each kind of difference."""
        found = {
            "samples, sigma, noise or losses differ in (rank, step)": self.different,
            "never taken: (rank, step)": self.lost,
            "rows of metrics.csv that differ": self.rows,
            "files that differ, or are in one run only": self.files,
        }
        return [f"{what}: {value}" for what, value in found.items() if value]


def compare_steps(undisturbed: Path, run: Path, ranks: int) -> Comparison:
    """Compares every step that a run has taken up to now, repeated ones too."""
    found = Comparison()
    traces = zip(read_traces(undisturbed, ranks), read_traces(run, ranks), strict=True)
    for rank, (expected, lines) in enumerate(traces):
        by_step = {line["step"]: line for line in expected}
        taken = {line["step"] for line in lines}
        found.steps += len(lines)
        found.repeated += len(lines) - len(taken)
        found.different += [(rank, line["step"]) for line in lines if line != by_step.get(line["step"])]
        found.lost += [(rank, step) for step in by_step if step not in taken]
    return found


def compare_runs(undisturbed: Path, run: Path, ranks: int) -> Comparison:
    """Compares every step of a run, repeated ones too, and all the files that it has left."""
    found = compare_steps(undisturbed, run, ranks)
    expected_rows, rows = Counter(metrics_rows(undisturbed)), Counter(metrics_rows(run))
    found.rows = (expected_rows - rows).total() + (rows - expected_rows).total()
    one, other = RunFolder(undisturbed), RunFolder(run)
    found.files += [one.fingerprint.name] if one.fingerprint.read_bytes() != other.fingerprint.read_bytes() else []
    found.files += [one.graft.name] if _tensors(one.graft) != _tensors(other.graft) else []
    found.files += sorted(_files(undisturbed) ^ _files(run))
    return found


def metrics_rows(run: Path) -> list[tuple[tuple[str, str], ...]]:
    """Rows of metrics.csv without speeds; their order may differ between runs."""
    rows = RunFolder(run).read_metrics()[1]
    return [tuple(sorted((k, v) for k, v in row.items() if v and k not in TIMING_COLUMNS)) for row in rows]


def _tensors(path: Path) -> dict[str, Any]:
    """Metadata and tensors of a safetensors file; the file's own bytes may differ, since its header has no order."""
    with safe_open(path, "np") as file:
        return file.metadata() | {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118


def _files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
