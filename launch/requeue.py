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


def requeue() -> str:
    """Queues this job again. Slurm ends the job's steps for that, so it comes after everything is on the disk.

    Returns:
        One line that says what came of it; a failure is no error, since the run's state is safe.
    """
    job = job_id()
    if job is None or not re.fullmatch(r"[0-9_]+", job):
        return f"not queued again: no Slurm job (SLURM_JOB_ID {job!r}); go on with --run.resume true"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return f"job {job} could not be queued again: {error}"
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        return f"job {job} could not be queued again: scontrol exited with {done.returncode}: {said}"
    return f"job {job} is queued again"
