"""Kills one run at random moments until it is done, and compares it with a run that is not killed.

    python -m tests.kills.series --kills 50 --ranks 2 --seed 0

Each time one rank, or all of them at once, get SIGKILL: mostly at a moment drawn uniformly from an interval of
training, sometimes while the ranks start. Every process must then end by itself, and the run is resumed from the disk.
All that was ever trained on, measured and written is compared with the undisturbed run, bit for bit.
"""

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from data.files import temporaries
from launch.run_folder import RunFolder
from tests.kills.comparison import compare_runs
from tests.kills.step_trace import START, count_steps, last_phase, read_trace
from tests.kills.summary import KilledRun, KillRecord, faults_of_kills, summary_rows
from tests.kills.tiny_fit import STEPS, fit_arguments, write_recipe
from tests.support.ranks import Ranks, reblock, wait_for
from trainer.checkpoint.file import checkpoint_fault

#: Steps of the run for each kill, and the share of kills that fall into a start.
_STEPS_PER_KILL, _START_SHARE = 7, 0.2
#: Seconds in which a start must come to its first step, a surviving rank must end, and its loader processes after it.
_START_LIMIT, _END_LIMIT, _ORPHAN_LIMIT = 240.0, 120.0, 60.0


@dataclass
class KillSeries:
    """Kills the run `killed` of a recipe.

    Args:
        recipe: of the run.
        kills: number of kills.
        ranks: processes that train together.
        seed: of the moments and the victims.
        steps: of the whole run.
        step_s: seconds a step takes, validation and measurements included.
        start_s: seconds from a start to its first step.
    """

    recipe: Path
    kills: int
    ranks: int
    seed: int
    steps: int
    step_s: float
    start_s: float
    result: KilledRun = field(init=False)

    def __post_init__(self) -> None:
        self.result = KilledRun(self.recipe.parent / "runs" / "killed")

    def run(self) -> KilledRun:
        """Starts the run, kills it and resumes it until all kills are made, then lets it finish."""
        draw, run = random.Random(self.seed), self.result.folder
        while len(self.result.kills) < self.kills:
            before = count_steps(run)
            with started(self.recipe, "killed", self.ranks) as job:
                in_start = draw.random() < _START_SHARE
                victims = self._wait_in_start(draw) if in_start else self._wait_in_training(draw, job, before)
                if victims is None:
                    continue
                if job.ended():
                    if any(job.statuses()):
                        raise RuntimeError(f"a start failed by itself:\n{job.output()}")
                    break  # done before all kills were made
                phase = START if in_start and count_steps(run) == before else None
                self.result.kills.append(kill_ranks(job, run, victims, phase=phase))
                self._read_log(job, stepped=count_steps(run) > before)
                print(f"kill {len(self.result.kills)}: {self.result.kills[-1]}; step {_reached(run)}", flush=True)
        with started(self.recipe, "killed", self.ranks) as job:
            finish(job, run)
            self._read_log(job, stepped=True)
        return self.result

    def _wait_in_start(self, draw: random.Random) -> list[int]:
        # All ranks: one that waits for others who never come is the launcher's to end, not its own.
        time.sleep(draw.uniform(0, self.start_s))
        return list(range(self.ranks))

    def _wait_in_training(self, draw: random.Random, job: Ranks, before: int) -> list[int] | None:
        """Waits for a random moment of training; None if the start came to no step."""
        run = self.result.folder
        victims = draw.choice([[rank] for rank in range(self.ranks)] + [list(range(self.ranks))])
        if not _wait_for_step(run, before, job):
            self.result.stalled += 1
            print(f"a start came to no step in {_START_LIMIT:.0f} s", flush=True)
            return None
        interval = 2 * self.step_s * (self.steps - _reached(run)) / (self.kills - len(self.result.kills) + 1)
        until = time.monotonic() + draw.uniform(0, interval)
        while time.monotonic() < until and _reached(run) < self.steps - 1 and not job.ended():
            time.sleep(0.005)
        return victims

    def _read_log(self, job: Ranks, *, stepped: bool) -> None:
        """Counts where a start resumed; one that came to no step resumed nowhere."""
        log = job.logs[0].read_text(errors="replace")
        self.result.fallbacks += "going on from the one before it" in log
        self.result.from_scratch += stepped and "resuming " not in log


@contextmanager
def started(recipe: Path, name: str, ranks: int) -> Iterator[Ranks]:
    """The run `name`, started or resumed."""
    with reblock(recipe.parent / "logs" / name, *fit_arguments(recipe, name), ranks=ranks) as job:
        yield job


def finish(job: Ranks, run: Path) -> None:
    """Waits until a job has ended with status 0.

    Raises:
        RuntimeError: if it fails, or takes no step for too long.
    """
    while not job.ended():
        if not _wait_for_step(run, count_steps(run), job):
            raise RuntimeError(f"no step in {_START_LIMIT:.0f} s:\n{job.output()}")
    if any(job.statuses()):
        raise RuntimeError(f"the run failed:\n{job.output()}")


def kill_ranks(job: Ranks, run: Path, victims: list[int], *, phase: str | None = None) -> KillRecord:
    """Kills `victims` and records which status every rank ends with, what is left over and which files are damaged.

    Args:
        job: the running ranks.
        run: its run folder.
        victims: ranks that get SIGKILL.
        phase: of the fit; None reads it from the first victim's trace.
    """
    for rank in victims:
        job.processes[rank].kill()
    for rank in victims:
        job.processes[rank].wait()
    phase = phase or last_phase(run, victims[0])
    checkpoints = RunFolder(run).checkpoints
    writing = bool(temporaries(checkpoints))
    start = time.monotonic()
    with suppress(TimeoutError):  # what is left over is counted below
        wait_for(job.ended, _END_LIMIT, "the ranks to end")
        wait_for(lambda: not job.left_over(), _ORPHAN_LIMIT, "loader processes to end")
    return KillRecord(
        victims=victims,
        phase=phase,
        writing=writing,
        statuses=[process.poll() for process in job.processes],
        seconds=time.monotonic() - start,
        orphans=len(job.left_over()),
        damaged=[f"{path.name}: {fault}" for path in checkpoints.glob("*.ckpt") if (fault := checkpoint_fault(path))],
    )


def _wait_for_step(run: Path, before: int, job: Ranks) -> bool:
    """Whether a step beyond `before` is taken in time, or the job has ended."""
    with suppress(TimeoutError):
        return wait_for(lambda: count_steps(run) > before or job.ended(), _START_LIMIT, "the first step")
    return False


def _reached(run: Path) -> int:
    """Steps that the run has completed, as its trace records them."""
    lines = read_trace(run)
    return lines[-1]["step"] + 1 if lines else 0


def run_series(*, kills: int = 50, ranks: int = 2, seed: int = 0) -> tuple[str, list[tuple[str, str]], str]:
    """Trains undisturbed, trains with kills, compares.

    Returns:
        A title, the rows of a table, and a line on the time that it took.

    Raises:
        RuntimeError: naming what differs, is damaged or is left over; the folder is kept then.
    """
    if kills < 1 or ranks < 1:
        raise ValueError(f"got kills {kills}, ranks {ranks}; expected at least 1 of each.")
    folder = Path(tempfile.mkdtemp(prefix="reblock-kills-"))
    recipe = write_recipe(folder, epochs=max(3, -(-kills * _STEPS_PER_KILL // STEPS)), ranks=ranks)
    begun = time.monotonic()
    with started(recipe, "undisturbed", ranks) as job:
        undisturbed = folder / "runs" / "undisturbed"
        _wait_for_step(undisturbed, 0, job)
        start_s = time.monotonic() - begun
        finish(job, undisturbed)
    lines = read_trace(undisturbed)
    steps = lines[-1]["step"] + 1
    step_s = (lines[-1]["time"] - lines[0]["time"]) / (steps - 1)
    killed = KillSeries(recipe, kills, ranks, seed, steps, step_s, start_s).run()
    comparison = compare_runs(undisturbed, killed.folder, ranks)
    faults, rows = comparison.faults() + faults_of_kills(killed, kills), summary_rows(killed, comparison, ranks)
    if faults:
        raise RuntimeError("\n".join([*faults, *(f"{name}: {value}" for name, value in rows), f"See {folder}."]))
    shutil.rmtree(folder)
    title = f"{len(killed.kills)} kills over a run of {steps} steps on {ranks} rank(s), seed {seed}"
    return title, rows, f"{time.monotonic() - begun:.0f} s in all; {start_s:.1f} s from a start to its first step."


def main(argv: list[str]) -> None:
    """Runs a series and prints its table, with hardware and versions."""
    from launch.bench.result import BenchResult, show

    parser = argparse.ArgumentParser(prog="tests.kills.series", description="Kills a run and compares what it leaves.")
    parser.add_argument("--kills", type=int, default=50, help="number of kills (50)")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train together (2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims (0)")
    title, rows, note = run_series(**vars(parser.parse_args(argv)))
    show(BenchResult(title=title, columns=("", "found"), rows=rows, notes=(note,)))


if __name__ == "__main__":
    main(sys.argv[1:])
