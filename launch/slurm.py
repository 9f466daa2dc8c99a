"""Calls of Slurm's own commands. Where one is not installed, fails or does not answer in time, the result is None."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds; a controller under load answers late.
_PATIENCE = 60


@dataclass(frozen=True)
class Partition:
    """What a partition allows.

    Args:
        name: of the partition.
        default: whether it is taken if none is named.
        nodes: in it.
        max_time: as Slurm writes it.
        cpus: of its largest node.
        gpus: of its best node; None if it lists none.
    """

    name: str
    default: bool
    nodes: int
    max_time: str
    cpus: int
    gpus: int | None


def at_hand(command: str = "sbatch") -> bool:
    """Whether a command of Slurm's is installed."""
    return shutil.which(command) is not None


def ask(*command: str) -> str | None:
    """What a command prints; None if it is not there, fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def fields(line: str) -> dict[str, str]:
    """A line of `scontrol --oneliner show`: KEY=VALUE, where a value may hold spaces."""
    return {m[1]: m[2] for m in re.finditer(r"(\S+?)=(.*?)(?= [A-Za-z/:_]+=|$)", line.strip())}


def partitions() -> list[Partition] | None:
    """The partitions; None where Slurm does not answer."""
    shown = ask("scontrol", "--oneliner", "show", "partition")
    nodes = ask("sinfo", "--noheader", "--Node", "--format=%R|%c|%G")
    if shown is None or nodes is None:
        return None
    found = []
    for facts in map(fields, shown.splitlines()):
        rows = [row.split("|") for row in nodes.splitlines() if row.split("|")[0] == facts.get("PartitionName")]
        if rows:
            gpus = [count for row in rows if (count := _gpus(row[2])) is not None]
            cpus = max(int(row[1].rstrip("+")) for row in rows)
            found.append(
                Partition(facts["PartitionName"], facts["Default"] == "YES", int(facts["TotalNodes"]), facts["MaxTime"],
                          cpus, max(gpus, default=None))
            )  # fmt: skip
    return found


def _gpus(gres: str) -> int | None:
    """Of `gpu:8`, `gpu:h100:8(S:0-1)`, `(null)`: how many GPUs."""
    counts = [int(m[1]) for m in re.finditer(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)]
    return sum(counts) if counts else None


def has_pyxis() -> bool | None:
    """Whether srun knows --container-image; None where there is no srun."""
    said = ask("srun", "--help")
    return None if said is None else "--container-image" in said


def node_timeout() -> int:
    """SlurmdTimeout, seconds; Slurm's default where it does not answer."""
    found = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", ask("scontrol", "show", "config") or "", re.MULTILINE)
    return int(found[1]) if found else 300


def dependency(after: Sequence[str], *, alone: bool) -> str:
    """The option of sbatch that `submit` gives."""
    return f"--dependency=afterok:{':'.join(after)}" + (",singleton" if alone else "")


def submit(script: Path, after: Sequence[str], *, alone: bool = False) -> str:
    """Queues a script, to start when the jobs `after` have succeeded; the new job's id.

    Args:
        script: the file.
        after: ids of jobs.
        alone: also when no other job of its name runs, as its script says too; a dependency given here replaces that.

    Raises:
        ValueError: if Slurm refuses it, with what it said.
    """
    waits = [dependency(after, alone=alone), "--kill-on-invalid-dep=yes"] if after else []
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", *waits, str(script)], capture_output=True, text=True, timeout=_PATIENCE
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"sbatch {script}: {error}") from error
    if done.returncode:
        raise ValueError(f"Slurm refused {script}: {done.stderr.strip()}")
    return done.stdout.strip().split(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Takes jobs out of the queue."""
    if jobs:
        ask("scancel", *jobs)


def job(number: str) -> list[dict[str, str]]:
    """What Slurm knows of a job, a dictionary for each task of an array; empty where it knows nothing any more."""
    shown = ask("scontrol", "--oneliner", "show", "job", number)
    if shown is not None:
        return [fields(line) for line in shown.splitlines() if line.startswith("JobId=")]
    # The controller forgets what ended some minutes ago; the accounting does not, where there is one.
    rows = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}",
               "--format=JobID,State,Start,End,NodeList,ExitCode")  # fmt: skip
    names = ("JobId", "JobState", "StartTime", "EndTime", "NodeList", "ExitCode")
    return [dict(zip(names, row.split("|"), strict=True)) for row in (rows or "").splitlines()]


def unfinished(number: str) -> str | None:
    """PENDING, RUNNING or the like if a job is still in the queue."""
    states = [facts.get("JobState", "") for facts in job(number)]
    waiting = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "STOPPED")
    return next((state for state in states if state in waiting), None)
