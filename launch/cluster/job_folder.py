"""What `reblock submit` writes into the run folder: scripts, the resolved recipe, versions, the code's state, job ids.

job.sbatch, encode.sbatch, export.sbatch   the scripts
job/config.yaml                            the recipe, as the job reads it
job/versions.json                          packages, commit, command
job/changes.diff                           how the code differed from that commit
job/jobs.jsonl                             a line for each job that was queued
logs/                                      of scripts and tasks
"""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from data.files import append_line, write_json, write_text
from launch.cluster.batch_script import BatchScript, render
from launch.cluster.stage_scripts import Submission
from launch.run_folder import RunFolder
from launch.versions import git_output


def changes() -> str:
    """How the code differs from its commit, as a patch; new files too. Empty outside a checkout."""
    new = [name for name in git_output("ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
    patches = [git_output("diff", "--no-index", "--", os.devnull, name) for name in new]
    return "".join([git_output("diff", "--binary", "HEAD"), *patches])


def write_folder(submission: Submission, recipe: str, scripts: Sequence[BatchScript], versions: dict[str, Any]) -> None:
    """Writes all but the job ids.

    Args:
        submission: what is submitted.
        recipe: text of the resolved recipe.
        scripts: of its stages.
        versions: as `launch.versions.versions` gives them.

    Raises:
        ValueError: if the folder cannot be written.
    """
    try:
        submission.run.logs.mkdir(parents=True, exist_ok=True)
        write_text(submission.run.job_config, recipe)
        write_json(submission.run.job_versions, versions)
        write_text(submission.run.job_changes, changes())
        for script in scripts:
            write_text(script.path, render(script))
    except OSError as error:
        raise ValueError(
            f"cannot write the run folder {submission.run.path} ({error.strerror}); expected a writable place that the "
            "nodes see too. Set --run.root."
        ) from error


def note_job(run: RunFolder, stage: str, number: str, after: Sequence[str], nodes: int) -> None:
    """Appends a job to the run's list."""
    entry = {"job": number, "stage": stage, "after": list(after), "nodes": nodes, "time": f"{datetime.now():%F %T}"}
    append_line(run.job_list, json.dumps(entry))


def noted_jobs(run: RunFolder) -> list[dict[str, Any]]:
    """The jobs of a run, the first one first; lines that are cut short are left out.

    A job is noted by who submits it, and by its script where that was done by hand: whichever comes first counts.
    """
    found: dict[str, dict[str, Any]] = {}
    path = run.job_list
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and isinstance(entry.get("job"), str):
            found.setdefault(entry["job"], entry)
    return list(found.values())
