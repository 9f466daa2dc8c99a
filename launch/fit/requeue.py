"""Requeues the Slurm job of a run that has stopped before its end, unless that is off or left to the job's script."""

import os
import re
import shutil
import subprocess
from typing import Literal, get_args

Mode = Literal["self", "script", "never"]


def mode() -> Mode:
    """Value of REBLOCK_REQUEUE. Its default is `self` in a Slurm batch job with `scontrol`, otherwise `never`.

    Raises:
        ValueError: if the variable holds any other value.
    """
    given = os.environ.get("REBLOCK_REQUEUE")
    if given is None:
        batch = job_id() is not None and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")
        return "self" if batch and shutil.which("scontrol") else "never"
    if given not in get_args(Mode):
        raise ValueError(
            f"got REBLOCK_REQUEUE={given!r}, expected one of: {', '.join(get_args(Mode))}. `self` queues the job again "
            "with scontrol, `script` leaves that to the job's script (exit status 75), `never` ends it."
        )
    return given  # type: ignore[return-value]  # one of the literals


def job_id() -> str | None:
    """Id of the Slurm job that runs this process, or None. For a task of an array it is ARRAYJOB_TASK."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def preempted() -> bool:
    """Whether Slurm preempts this job to give its nodes to another.

    If the partition has a GraceTime, Slurm does not requeue a preempted job that exits within it.
    """
    try:
        return re.search(r" PreemptTime=\d", _scontrol("show", "job", "--oneliner")) is not None
    except RuntimeError:
        return False


def requeue() -> str:
    """Requeues this job. Slurm then kills the job's steps, so everything must be on disk before.

    Returns:
        One line with the outcome. A failure raises nothing, since the run's state is saved.
    """
    try:
        _scontrol("requeue")
    except RuntimeError as error:
        return f"not queued again: {error}; go on with --run.resume true"
    return f"job {job_id()} is queued again"


def _scontrol(*words: str) -> str:
    """Output of `scontrol WORDS JOB` for this job.

    Raises:
        RuntimeError: if this is no Slurm job, or if the command fails.
    """
    job = job_id()
    if job is None or not re.fullmatch(r"[0-9_]+", job):
        raise RuntimeError(f"no Slurm job (SLURM_JOB_ID {job!r})")
    try:
        done = subprocess.run(["scontrol", *words, job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        raise RuntimeError(str(error)) from error
    if done.returncode:
        raise RuntimeError(f"scontrol exited with {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout
