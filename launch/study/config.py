"""What every study is told: base, prompts, seeds, settings of the videos, layers and heads, this process's share."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

#: The embedded base, for a study without `--base`: a small Mochi with one planted sink in each of its last four blocks.
DEMO_BASE = Path(__file__).resolve().parents[2] / "recipes" / "demo_base"
#: Its denoising steps, so that a study takes minutes.
DEMO_STEPS = 16

#: Default prompts, in the language of `reblock synth`: as many as an interval needs.
PROMPTS = (
    "a red circle moves right over a dark gray background",
    "a yellow star moves down over a dark blue background",
    "a purple square moves left over a light green background",
    "a green triangle moves up over a dark red background",
    "a blue circle moves down over a light gray background",
    "a cyan star moves left over a dark green background",
)

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """Options of every study.

    Args:
        out: folder of the study; a study that was stopped goes on there.
        base: complete diffusers pipeline folder or hub id; the demo's small base by default.
        prompts: text file with one prompt a line; captions of the synthetic clips by default.
        seeds: of the noise; every prompt is drawn with each.
        own_noise: every prompt has noise of its own; by default all prompts of a seed have the same.
        steps: number of denoising steps; None takes the family's, or 16 with the demo's base.
        guidance: guidance scale; None takes the family's.
        frames: number of frames per video; None takes the family's.
        height: height in pixels, a multiple of 16.
        width: width in pixels, a multiple of 16.
        fps: frames per second of the files.
        measured_steps: denoising steps at which attention is measured, evenly spread.
        layers: blocks that are studied; None takes all.
        heads: heads that are studied one by one; None takes all.
        device: torch device.
        dtype: dtype of the weights, float32 or bfloat16.
        share: `I/N` does the I-th of N parts, from 0; by default that of a SLURM array's task and rank, or all.
    """

    out: Path
    base: str | None = None
    prompts: Path | None = None
    seeds: tuple[int, ...] = (0,)
    own_noise: bool = False
    steps: int | None = None
    guidance: float | None = None
    frames: int | None = None
    height: int = 64
    width: int = 64
    fps: int = 12
    measured_steps: int = 4
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    device: str = "cpu"
    dtype: str = "float32"
    share: str | None = None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are left out.

    Raises:
        ValueError: if there is none, or one stands twice.
    """
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines or len(set(lines)) != len(lines):
        raise ValueError(f"got {len(lines)} prompts, {len(set(lines))} different, in {path}; expected each once.")
    return lines


def part_of(items: Sequence[Item], index: int, count: int) -> Sequence[Item]:
    """The index-th of `count` parts of a list, in order: parts of neighbours, whose sizes differ by at most one."""
    return items[len(items) * index // count : len(items) * (index + 1) // count]


def read_share(text: str | None, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(index, count) of this process's part of the work.

    Args:
        text: `I/N`; None reads the SLURM array task and the rank.
        environment: of the process.

    Raises:
        ValueError: if the text is no such pair.
    """
    if text is not None:
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise ValueError(f"got share {text!r}, expected I/N with I from 0 to N - 1, for example 0/4.")
        return int(index), int(count)

    def number(*names: str, default: int) -> int:
        return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), default)

    ranks, rank = number("WORLD_SIZE", "SLURM_NTASKS", default=1), number("RANK", "SLURM_PROCID", default=0)
    first, last = number("SLURM_ARRAY_TASK_MIN", default=0), number("SLURM_ARRAY_TASK_MAX", default=0)
    task = number("SLURM_ARRAY_TASK_ID", default=first) - first
    return task * ranks + rank, (last - first + 1) * ranks
