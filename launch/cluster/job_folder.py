"""Files that `reblock submit` writes into the run folder.

job.sbatch, encode.sbatch, export.sbatch   scripts
job/config.yaml                            resolved recipe that the job reads
job/versions.json                          versions of packages, commit, command
job/changes.diff                           changes of the code since that commit
job/jobs.jsonl                             one line for each queued job
logs/                                      logs of scripts and tasks
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
    """Changes of the code since its commit as a patch, with new files; empty outside a checkout."""
    new = [name for name in git_output("ls-files", "--others", "--exclude-standard", "-z").split("\0") if name]
    patches = [git_output("diff", "--no-index", "--", os.devnull, name) for name in new]
    return "".join([git_output("diff", "--binary", "HEAD"), *patches])


def write_folder(submission: Submission, recipe: str, scripts: Sequence[BatchScript], versions: dict[str, Any]) -> None:
    """Writes all files except the list of jobs.

    Args:
        submission: the submission.
        recipe: text of the resolved recipe.
        scripts: scripts of its stages.
        versions: result of `launch.versions.versions`.

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
    """Appends a job to the run's list of jobs."""
    entry = {"job": number, "stage": stage, "after": list(after), "nodes": nodes, "time": f"{datetime.now():%F %T}"}
    append_line(run.job_list, json.dumps(entry))


def noted_jobs(run: RunFolder) -> list[dict[str, Any]]:
    """The jobs of a run, oldest first; skips incomplete lines.

    Both `reblock submit` and the script itself list a job, since a user may submit the script by hand. The first entry
    of a job counts.
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
