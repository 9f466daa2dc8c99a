"""`reblock status RUN`: shows a run's jobs, progress, checkpoint and errors. It reads files and asks Slurm only."""

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch import slurm
from launch.cluster.job_folder import noted_jobs
from launch.run_folder import RunFolder

#: Logged values to show, in this order; of the measurements only the main results.
_FIGURES = (
    "train/loss", "val/loss", "train/grad_norm", "train/lr", "train/skipped", "data/faults", "sinks/heads",
    "sinks/max_frequency", "masking/retrained/critical_ratio", "masking/all/critical_ratio",
)  # fmt: skip
_TROUBLE = re.compile(r"Traceback \(most recent|\berror:|\bError\b|CANCELLED|DUE TO|oom.kill|Killed|Segmentation", re.I)
_START = re.compile(r"job (\S+): start (\d+) \((\d+) requeued\)")
#: Bytes to read from the end of a log, enough for a traceback.
_END = 1 << 16


def status(run: Path, *, lines: int = 12) -> None:
    """Prints the state of a run: its jobs and requeues, speed, latest logged values, checkpoint and errors.

    Args:
        run: the run folder.
        lines: largest number of lines to show from each log with errors.

    Raises:
        ValueError: if the folder does not exist.
    """
    if not run.is_dir():
        raise ValueError(
            f"{run} is no folder; expected a run folder, which `reblock submit` or `reblock fit` has made."
        )
    print(run)
    folder = RunFolder(run)
    for title, found in (
        ("jobs", job_lines(folder)), ("progress", progress_lines(folder)), ("checkpoint", checkpoint_lines(folder)),
        ("errors", trouble_lines(folder, lines)),
    ):  # fmt: skip
        print(f"{title}:")
        print("\n".join(f"  {line}" for line in found))


# -- jobs ----------------------------------------------------------------------------------------------------------


def job_lines(run: RunFolder) -> list[str]:
    """One line for each submitted job; for an array, one line for each state of its tasks."""
    jobs = noted_jobs(run)
    if not jobs:
        return ["none was submitted by reblock submit"]
    known = slurm.at_hand("scontrol")
    found = [line for entry in jobs for line in (_job_lines(run, entry) if known else [_unknown(run, entry)])]
    return found if known else [*found, "(Slurm's commands are not here: what runs now is not known)"]


def _job_lines(run: RunFolder, entry: dict[str, Any]) -> list[str]:
    tasks = slurm.job(entry["job"])
    if not tasks:
        return [f"{_unknown(run, entry)} (Slurm knows nothing of it any more)"]
    by_state: dict[str, list[dict[str, str]]] = {}
    for facts in tasks:
        by_state.setdefault(facts.get("JobState", "?").split()[0], []).append(facts)
    return [_job_line(entry, state, own, len(tasks)) for state, own in by_state.items()]


def _job_line(entry: dict[str, Any], state: str, tasks: list[dict[str, str]], total: int) -> str:
    facts = tasks[0]
    parts = [f"{entry['stage']} {entry['job']}", state + (f" {len(tasks)} of {total} tasks" if total > 1 else "")]
    if state in ("RUNNING", "COMPLETING", "SUSPENDED"):
        parts.append(f"since {_when(facts.get('StartTime'))} on {facts.get('NodeList')}")
        if facts.get("EndTime", "Unknown") != "Unknown" and facts.get("TimeLimit") != "UNLIMITED":
            parts.append(f"its time ends at {_when(facts['EndTime'])}")
    elif state == "PENDING":
        parts.append(f"waits for: {facts.get('Reason', '?')}")
    else:
        parts.append(f"from {_when(facts.get('StartTime'))} to {_when(facts.get('EndTime'))}")
        if facts.get("ExitCode", "0:0") != "0:0":
            parts.append(f"exit code {facts['ExitCode'].split(':')[0]}")
    restarts = max(int(task.get("Restarts") or 0) for task in tasks)
    return ", ".join([*parts, f"requeued {_times(restarts)}"])


def _unknown(run: RunFolder, entry: dict[str, Any]) -> str:
    restarts = [int(found[3]) for found in _starts(run) if found[1].split("_")[0] == entry["job"]]
    seen = f", started, requeued {_times(max(restarts))}" if restarts else ""
    return f"{entry['stage']} {entry['job']}, submitted {entry.get('time')}{seen}"


def _starts(run: RunFolder) -> Iterator[re.Match[str]]:
    for path in run.logs.glob("*.log"):
        if not re.search(r"-r\d+-\d+\.log$", path.name):
            yield from _START.finditer(_end_of(path))


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _when(stamp: str | None) -> str:
    return (stamp or "?").replace("T", " ")


# -- progress ------------------------------------------------------------------------------------------------------


def progress_lines(run: RunFolder) -> list[str]:
    """Step, speed and the latest logged values, from metrics.csv."""
    # Skips an incomplete row, which a fit may be writing: it has no step.
    rows = [row for row in run.read_metrics()[1] if (row.get("step") or "").isdigit()]
    trained = [row for row in rows if row.get("train/loss")]
    if not trained:
        return ["no step was logged yet"]
    last, recipe = trained[-1], run.read_config()
    epochs = recipe.get("trainer", {}).get("max_epochs")
    # Epochs count from one, as in the log.
    epoch = int(float(last["epoch"])) + 1 if last.get("epoch") else "?"
    age = _ago(time.time() - run.metrics.stat().st_mtime)
    found = [f"step {int(last['step']) + 1}, epoch {epoch}{f' of {epochs}' if epochs else ''}, written {age}"]
    samples = next(
        (float(row["train/samples_per_s"]) for row in reversed(rows) if row.get("train/samples_per_s")), None
    )
    if samples is not None:
        size = _samples_per_step(recipe)
        steps = f"{samples / size:.3g} steps/s ({size / samples:.3g} s a step), " if size and samples else ""
        found.append(f"{steps}{samples:.3g} samples/s")
    else:
        found.append("speed: not measured yet, it takes some steps in a row")
    values = {name: row[name] for row in rows for name in row if row.get(name)}
    return [*found, *(f"{name} {float(values[name]):.5g}" for name in _FIGURES if name in values)]


def _samples_per_step(recipe: dict[str, Any]) -> int | None:
    """Number of samples of all ranks in one optimiser step; None if the recipe does not determine it."""
    data, trainer = recipe.get("data", {}).get("init_args", {}), recipe.get("trainer", {})
    whole, own = data.get("global_batch_size"), data.get("batch_size")
    ranks = [trainer.get("num_nodes", 1), trainer.get("devices", 1)]
    if whole is None and own is not None and all(isinstance(count, int) for count in ranks):
        whole = own * math.prod(ranks)
    return None if whole is None else whole * (trainer.get("accumulate_grad_batches") or 1)


# -- checkpoint ----------------------------------------------------------------------------------------------------


def checkpoint_lines(run: RunFolder) -> list[str]:
    """Age, step and size of `last.ckpt`, and whether the fit is complete."""
    path, found = run.last_checkpoint, list[str]()
    if path.is_file():
        facts = path.stat()
        age = _ago(time.time() - facts.st_mtime)
        found.append(f"last.ckpt: {_step(path)}, written {age}, {facts.st_size / 2**20:,.1f} MiB")
    else:
        found.append("none yet")
    if run.graft.is_file():
        found.append("graft.safetensors is there: the fit has come to its end")
    return found


def _step(path: Path) -> str:
    import torch

    try:
        # Memory-mapped, since the file may have gigabytes and only one number is needed.
        return f"step {torch.load(path, map_location='cpu', mmap=True, weights_only=True)['global_step']}"
    except Exception as error:  # damaged bytes may make torch raise any exception
        return f"cannot be read ({type(error).__name__})"


# -- errors --------------------------------------------------------------------------------------------------------


def trouble_lines(run: RunFolder, lines: int) -> list[str]:
    """The last lines of each log of the newest start that mentions errors."""
    found: list[str] = []
    for path in _newest(run.logs):
        said = [line.rstrip() for line in _end_of(path).splitlines() if line.strip()]
        marks = [i for i, line in enumerate(said) if _TROUBLE.search(line)]
        if marks:
            # Starts at the last traceback, or else at the first line that mentions an error.
            traces = [i for i in marks if said[i].startswith("Traceback")]
            shown = said[traces[-1] if traces else marks[0] :]
            found += [f"{path}:", *(f"  {line}" for line in shown[-lines:])]
    return found or ["none in the logs of the last start"]


def _newest(logs: Path) -> list[Path]:
    """The script log that was written last, and the task logs of its last start."""
    scripts = [path for path in logs.glob("*.log") if not re.search(r"-r\d+-\d+\.log$", path.name)]
    if not scripts:
        return []
    newest = max(scripts, key=lambda path: path.stat().st_mtime)
    tasks = [path for path in logs.glob("*.log") if path.name.startswith(f"{newest.stem}-r")]
    starts = {path: int(m[1]) for path in tasks if (m := re.search(r"-r(\d+)-\d+\.log$", path.name))}
    last = max(starts.values(), default=0)
    return [newest, *sorted(path for path, start in starts.items() if start == last)]


def _end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - _END))
        return file.read().decode(errors="replace")


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(0, seconds):.0f} s ago"
