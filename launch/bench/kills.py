"""`reblock bench kills`: one run that is killed at random moments until it is done, against one that is not.

Each time one rank, or all of them at once, get SIGKILL: mostly at a moment drawn uniformly from a stretch of training,
now and then while the ranks start up. Every process must then be gone by itself; the run is started again from what is
on the disk. All that was ever trained on, measured and written is compared with the undisturbed run, bit for bit.
"""

import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from data.bucket import Bucket
from data.files import temporaries
from launch.bench.command import Options, Result
from launch.bench.compare import Comparison, compare
from launch.bench.ranks import Ranks, wait_for
from launch.bench.stream import CHANNELS, write_shards
from launch.bench.trace import START, count_steps, moment
from trainer.checkpoint.file import checkpoint_fault

#: 72 samples, 8 of them held out, 4 in a step.
SAMPLES, HELD_OUT, BATCH, STEPS = 72, 8, 4, 16
#: Steps that a run is to last for each kill; the same share of kills falls into start-up.
_STEPS_A_KILL, _IN_START = 5, 0.2
#: Seconds in which a start must come to its first step, a surviving rank must end, and its helpers after it.
_START_LIMIT, _END_LIMIT, _ORPHAN_LIMIT = 240.0, 120.0, 60.0
#: Wide enough for a checkpoint that takes as long to write as a step.
BASE = {
    "_class_name": "MochiTransformer3DModel", "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32,
    "patch_size": 2, "pooled_projection_dim": 8, "in_channels": CHANNELS, "qk_norm": "rms_norm", "text_embed_dim": 16,
    "time_embed_dim": 16, "activation_fn": "swiglu", "max_sequence_length": 16,
}  # fmt: skip


@dataclass
class Kill:
    """One kill and what came after it. Seconds are of a surviving rank and of its helpers, until they were gone."""

    victims: list[int]
    moment: str
    writing: bool
    statuses: list[int | None]
    seconds: float
    orphans: int
    damaged: list[str]


@dataclass
class Course:
    """A run from its first start to its end."""

    folder: Path
    kills: list[Kill] = field(default_factory=list)
    fallbacks: int = 0
    stalled: int = 0
    from_scratch: int = 0


def make_world(folder: Path, *, epochs: int, ranks: int) -> Path:
    """A recipe of a small fit with everything in it: validation, a measurement, loader processes, checkpoints."""
    write_shards(folder / "latents", SAMPLES, Bucket(7, 32, 32), 18, None)
    (folder / "config.json").write_text(json.dumps(BASE))
    measurement = {"prompts": 2, "sigmas": [0.5], "base_stage": False}
    recipe = {
        "run": {"name": "whole", "root": str(folder / "runs"), "save_every": 3, "wandb": False},
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto",
            "precision": "32-true", "max_epochs": epochs, "enable_model_summary": False,
            "callbacks": [
                {"class_path": "launch.bench.trace.Trace"},
                {"class_path": "trainer.callbacks.sinks.SinkFrequency", "init_args": measurement},
            ],
        },
        "model": {
            "class_path": "trainer.module.RetrainBlocks",
            "init_args": {
                "base": str(folder / "config.json"), "surgery": {"last": 2}, "ema_decay": 0.9, "caption_dropout": 0.3,
                "optim": {"lr": 0.003, "warmup_steps": 5},
            },
        },
        "data": {
            "class_path": "data.modules.latents.LatentDataModule",
            "init_args": {
                "shards": str(folder / "latents"), "val_samples": HELD_OUT, "global_batch_size": BATCH,
                "num_workers": 1,
            },
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def arguments(recipe: Path, name: str) -> list[str]:
    """Of `reblock fit`, for a run of that name."""
    return ["fit", "--config", str(recipe), "--run.name", name, "--run.resume", "true"]


@contextmanager
def started(recipe: Path, name: str, ranks: int) -> Iterator[Ranks]:
    """The run `name`, started or gone on with."""
    with Ranks(arguments(recipe, name), ranks=ranks, logs=recipe.parent / "logs" / name) as job:
        yield job


def finish(job: Ranks, run: Path) -> None:
    """Waits for a job to end well.

    Raises:
        RuntimeError: if it fails, or comes to a stop.
    """
    while not job.ended():
        if not _wait_for_a_step(run, count_steps(run), job):
            raise RuntimeError(f"no step in {_START_LIMIT:.0f} s:\n{job.output()}")
    if any(job.wait(1.0)):
        raise RuntimeError(f"the run failed:\n{job.output()}")


def end_of(job: Ranks, run: Path, victims: list[int], ranks: int, *, now: str | None = None) -> Kill:
    """Kills `victims` and looks on: who ends how, what is left over, which files are damaged."""
    job.kill(victims)
    for victim in victims:
        job.processes[victim].wait()
    found = now or moment(run, victims[0])
    writing = bool(temporaries(run / "checkpoints"))
    start = time.monotonic()
    with suppress(TimeoutError):  # what is left is counted
        wait_for(job.ended, _END_LIMIT, "the ranks to end")
        wait_for(lambda: not job.left_over(), _ORPHAN_LIMIT, "helpers to end")
    statuses = [process.poll() for process in job.processes]
    seconds, orphans = time.monotonic() - start, len(job.left_over())
    damaged = [
        f"{path.name}: {fault}" for path in (run / "checkpoints").glob("*.ckpt") if (fault := checkpoint_fault(path))
    ]
    return Kill(victims, found, writing, statuses, seconds, orphans, damaged)


def disturbed(recipe: Path, *, kills: int, ranks: int, seed: int, steps: int, step_s: float, start_s: float) -> Course:
    """The run `killed`, with so many kills.

    Args:
        recipe: of the run.
        kills: how many.
        ranks: processes.
        seed: of moments and victims.
        steps: of the whole run.
        step_s: seconds a step takes, validation and measurements included.
        start_s: seconds from a start to its first step.
    """
    draw = random.Random(seed)
    course = Course(recipe.parent / "runs" / "killed")
    run = course.folder
    while len(course.kills) < kills:
        before = count_steps(run)
        with started(recipe, "killed", ranks) as job:
            if draw.random() < _IN_START:
                # All at once: a rank that waits for others who never come is the launcher's to end, not its own.
                victims, now = list(range(ranks)), START
                time.sleep(draw.uniform(0, start_s))
            else:
                victims, now = draw.choice([[rank] for rank in range(ranks)] + [list(range(ranks))]), None
                if not _wait_for_a_step(run, before, job):
                    course.stalled += 1
                    print(f"a start came to no step in {_START_LIMIT:.0f} s", flush=True)
                    continue
                stretch = 2 * step_s * (steps - _reached(run)) / (kills - len(course.kills) + 1)
                until = time.monotonic() + draw.uniform(0, stretch)
                while time.monotonic() < until and _reached(run) < steps - 1 and not job.ended():
                    time.sleep(0.005)
            if job.ended():
                if any(job.wait(1.0)):
                    raise RuntimeError(f"a start failed by itself:\n{job.output()}")
                break  # done before all kills were made
            course.kills.append(end_of(job, run, victims, ranks, now=None if count_steps(run) > before else now))
            _read(course, job, stepped=count_steps(run) > before)
            print(_line(course, run), flush=True)
    with started(recipe, "killed", ranks) as job:
        finish(job, run)
        _read(course, job, stepped=True)
    return course


def _wait_for_a_step(run: Path, before: int, job: Ranks) -> bool:
    """Whether a step more than `before` is there in time, or the job has ended."""
    with suppress(TimeoutError):
        return wait_for(lambda: count_steps(run) > before or job.ended(), _START_LIMIT, "the first step")
    return False


def _reached(run: Path) -> int:
    """Steps that are behind the run, as its trace has it."""
    path = run / "trace" / "rank0.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return json.loads(lines[-1])["step"] + 1 if lines else 0


def _read(course: Course, job: Ranks, *, stepped: bool) -> None:
    """What a start said of where it began; one that came to no step began nowhere."""
    said = job.logs[0].read_text(errors="replace")
    course.fallbacks += "going on from the one before it" in said
    course.from_scratch += stepped and "resuming " not in said


def _line(course: Course, run: Path) -> str:
    kill = course.kills[-1]
    who = "all" if len(kill.victims) > 1 else f"rank {kill.victims[0]}"
    what = f"{kill.moment}{', a checkpoint half written' if kill.writing else ''}"
    return (
        f"kill {len(course.kills)}: {who} in {what}; step {_reached(run)}; statuses {kill.statuses}, all gone after "
        f"{kill.seconds:.1f} s"
    )


def run(options: Options) -> Result:
    """Kills a run and compares it.

    Raises:
        RuntimeError: saying what differs, is damaged or is left over; the folder is kept then.
    """
    folder = Path(tempfile.mkdtemp(prefix="reblock-bench-kills-"))
    epochs = max(3, -(-options.kills * _STEPS_A_KILL // STEPS))
    recipe = make_world(folder, epochs=epochs, ranks=options.ranks)
    begun = time.monotonic()
    with started(recipe, "whole", options.ranks) as job:
        whole = folder / "runs" / "whole"
        _wait_for_a_step(whole, 0, job)
        start_s = time.monotonic() - begun
        finish(job, whole)
    lines = (whole / "trace" / "rank0.jsonl").read_text().splitlines()
    first, last = (json.loads(lines[place]) for place in (0, -1))
    steps = last["step"] + 1
    course = disturbed(
        recipe, kills=options.kills, ranks=options.ranks, seed=options.seed, steps=steps,
        step_s=(last["time"] - first["time"]) / (steps - 1), start_s=start_s,
    )  # fmt: skip
    compared = compare(whole, course.folder, options.ranks)
    faults = compared.faults() + shortcomings(course, options.kills)
    rows = table(course, compared, options.ranks)
    if faults:
        listed = "\n".join(f"{name}: {value}" for name, value in rows)
        raise RuntimeError("\n".join([*faults, listed, f"See {folder}."]))
    return Result(
        title=f"{len(course.kills)} kills over a run of {steps} steps on {options.ranks} rank(s), seed {options.seed}",
        columns=("", "found"),
        rows=rows,
        notes=(f"{time.monotonic() - begun:.0f} s in all; start-up to the first step {start_s:.1f} s.",),
    )


def shortcomings(course: Course, kills: int) -> list[str]:
    """What a run must not show after a kill."""
    faults = [f"{course.stalled} start(s) came to a stop by themselves"] if course.stalled else []
    if len(course.kills) < kills:
        faults.append(f"the run ended after {len(course.kills)} of {kills} kills")
    for number, kill in enumerate(course.kills, 1):
        survivors = [status for rank, status in enumerate(kill.statuses) if rank not in kill.victims]
        if 0 in survivors:
            faults.append(f"after kill {number} a surviving rank ended with status 0")
        if None in survivors:
            faults.append(f"after kill {number} a surviving rank did not end")
        if kill.orphans:
            faults.append(f"after kill {number} {kill.orphans} processes were left over")
        if kill.damaged:
            faults.append(f"after kill {number} checkpoints were damaged: {kill.damaged}")
    return faults


def table(course: Course, compared: Comparison, ranks: int) -> list[tuple[str, str]]:
    """Rows of the result."""
    kills = course.kills
    alone = [kill for kill in kills if len(kill.victims) < ranks]
    who = Counter("all ranks" if len(k.victims) == ranks else f"rank {k.victims[0]}" for k in kills)
    when = Counter(kill.moment for kill in kills)
    survivors = sorted({str(s) for k in alone for rank, s in enumerate(k.statuses) if rank not in k.victims})
    seconds = [kill.seconds for kill in kills] or [0.0]
    return [
        ("killed", ", ".join(f"{name} {count}" for name, count in sorted(who.items()))),
        ("in", ", ".join(f"{name} {count}" for name, count in when.most_common())),
        ("while a checkpoint was half written", str(sum(kill.writing for kill in kills))),
        ("exit statuses of surviving ranks", ", ".join(survivors) or "-"),
        ("all processes gone after: median (worst)", f"{statistics.median(seconds):.1f} s ({max(seconds):.1f} s)"),
        ("starts that came to a stop by themselves", str(course.stalled)),
        ("processes left over", str(sum(kill.orphans for kill in kills))),
        ("damaged files under a checkpoint's name", str(sum(len(kill.damaged) for kill in kills))),
        ("starts from the first step again (no checkpoint yet)", str(course.from_scratch)),
        ("starts from previous.ckpt", str(course.fallbacks)),
        ("steps compared, all ranks", f"{compared.steps:,}, of these taken again {compared.again:,}"),
        ("steps with other samples, sigma, noise or losses", str(len(compared.otherwise))),
        ("steps lost", str(len(compared.lost))),
        ("rows of metrics.csv that differ", str(compared.rows)),
        ("files that differ or are left over", str(len(compared.files))),
    ]
