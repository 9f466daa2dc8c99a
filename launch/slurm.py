"""Calls of Slurm's commands. If a query is not installed, fails or does not answer in time, its result is None."""

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds to wait for a command; a controller under load answers late.
_PATIENCE = 60


@dataclass(frozen=True)
class Partition:
    """Limits of a partition.

    Args:
        name: name of the partition.
        default: whether it is the cluster's default partition.
        nodes: number of nodes.
        max_time: longest time limit, in Slurm's notation.
        cpus: number of CPUs of the node with the most.
        gpus: number of GPUs of the node with the most; None if the nodes list no GPUs.
    """

    name: str
    default: bool
    nodes: int
    max_time: str
    cpus: int
    gpus: int | None


def at_hand(command: str = "sbatch") -> bool:
    """Whether a command of Slurm is installed."""
    return shutil.which(command) is not None


def ask(*command: str) -> str | None:
    """Output of a command; None if it is not installed, fails or does not answer in time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def fields(line: str) -> dict[str, str]:
    """Parses a line of `scontrol --oneliner show`, which has KEY=VALUE pairs whose values may contain spaces."""
    return {m[1]: m[2] for m in re.finditer(r"(\S+?)=(.*?)(?= [A-Za-z/:_]+=|$)", line.strip())}


def partitions() -> list[Partition] | None:
    """The cluster's partitions; None if Slurm does not answer."""
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
    """Number of GPUs in a text like `gpu:8` or `gpu:h100:8(S:0-1)`; None for others, such as `(null)`."""
    counts = [int(m[1]) for m in re.finditer(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)]
    return sum(counts) if counts else None


def has_pyxis() -> bool | None:
    """Whether srun has the option --container-image; None if srun is not installed."""
    said = ask("srun", "--help")
    return None if said is None else "--container-image" in said


def node_timeout() -> int:
    """SlurmdTimeout in seconds; Slurm's default if Slurm does not answer."""
    found = re.search(r"^SlurmdTimeout\s*=\s*(\d+)", ask("scontrol", "show", "config") or "", re.MULTILINE)
    return int(found[1]) if found else 300


def dependency(after: Sequence[str], *, alone: bool) -> str:
    """Option of sbatch for a job that waits for `after`, and with `alone` also for other jobs of its name."""
    return f"--dependency=afterok:{':'.join(after)}" + (",singleton" if alone else "")


def submit(script: Path, after: Sequence[str], *, alone: bool = False) -> str:
    """Queues a script and returns the new job's id.

    Args:
        script: path of the script.
        after: ids of the jobs that must succeed before this one starts.
        alone: whether the job also waits for other jobs of its name. Its script asks for that too, but `after` replaces
            the script's dependency.

    Raises:
        ValueError: if Slurm refuses the script; gives Slurm's message.
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
    """Cancels jobs."""
    if jobs:
        ask("scancel", *jobs)


def job(number: str) -> list[dict[str, str]]:
    """Slurm's fields of a job, one dictionary for each task of an array; empty if Slurm has no record of it."""
    shown = ask("scontrol", "--oneliner", "show", "job", number)
    if shown is not None:
        return [fields(line) for line in shown.splitlines() if line.startswith("JobId=")]
    # The controller forgets a job some minutes after its end; the accounting, if there is one, does not.
    rows = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={number}",
               "--format=JobID,State,Start,End,NodeList,ExitCode")  # fmt: skip
    names = ("JobId", "JobState", "StartTime", "EndTime", "NodeList", "ExitCode")
    return [dict(zip(names, row.split("|"), strict=True)) for row in (rows or "").splitlines()]


def unfinished(number: str) -> str | None:
    """State of a job that is still in the queue, such as PENDING or RUNNING; None if it is not."""
    states = [facts.get("JobState", "") for facts in job(number)]
    waiting = ("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED", "STOPPED")
    return next((state for state in states if state in waiting), None)
