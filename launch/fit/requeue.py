"""A job whose run has stopped to go on later: queued again by us, by the job's script, or not at all."""

import os
import re
import shutil
import subprocess
from typing import Literal, get_args

Mode = Literal["self", "script", "never"]


def mode() -> Mode:
    """REBLOCK_REQUEUE; without it `self` in a Slurm batch job where `scontrol` is found, otherwise `never`.

    Raises:
        ValueError: if the variable holds anything else.
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
    """The Slurm job this process runs in, as `scontrol` takes it: an array's task by ARRAYJOB_TASK."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def preempted() -> bool:
    """Whether Slurm makes this job end to give its nodes to another.

    Where the partition gives it time for that (GraceTime), Slurm does not queue a job again that ends by itself.
    """
    try:
        return re.search(r" PreemptTime=\d", _scontrol("show", "job", "--oneliner")) is not None
    except RuntimeError:
        return False


def requeue() -> str:
    """Queues this job again. Slurm ends the job's steps for that, so it comes after everything is on the disk.

    Returns:
        One line that says what came of it; a failure is no error, since the run's state is safe.
    """
    try:
        _scontrol("requeue")
    except RuntimeError as error:
        return f"not queued again: {error}; go on with --run.resume true"
    return f"job {job_id()} is queued again"


def _scontrol(*words: str) -> str:
    """What `scontrol WORDS JOB` prints, of this job.

    Raises:
        RuntimeError: if there is no job, or it fails.
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
