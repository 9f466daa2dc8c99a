"""`reblock plan --study NAME`: forward passes, operations, memory and disk of a study, before anything is drawn.

Of the base it needs the transformer's config only. A forward pass of the sizes is traced with fake tensors.

Legend: B rows of a call, C channels, F latent frames, H W latent grid, L text tokens.
"""

import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from data.files import write_json
from launch.command_parser import CommandParser
from launch.plan.hardware import Hardware
from launch.plan.inputs import base_config
from launch.plan.operations import UsageCounter, make_empty
from launch.plan.table import gib, short
from launch.study.command import study_class
from launch.study.config import DEMO_BASE, StudyConfig
from launch.study.settings import StudySettings
from launch.study.study import Study
from trainer.models.captions import Captions
from trainer.models.families import split_model_of
from trainer.models.load import load_transformer, read_config


@dataclass(frozen=True)
class StudyPlan:
    """What a study takes.

    Args:
        pairs: (prompt, seed) pairs.
        videos: videos drawn for each pair, the dense one included.
        repeats: calls repeated for each pair.
        calls: calls of the transformer in all.
        wide_calls: of these, calls with the rows of two videos.
        flops: operations of one call's forward pass.
        weights: bytes of the transformer's weights.
        activations: peak bytes of a call of one video besides.
        disk: bytes kept of the dense drawings, pixels uncompressed.
    """

    pairs: int
    videos: int
    repeats: int
    calls: int
    wide_calls: int
    flops: int
    weights: int
    activations: int
    disk: int

    @property
    def total_flops(self) -> int:
        """Operations of all calls."""
        return (self.calls + self.wide_calls) * self.flops


def plan_study(study: Study, settings: StudySettings, config_file: Path) -> StudyPlan:
    """Counts a study's work.

    Args:
        study: with its options.
        settings: of the study.
        config_file: config.json of the transformer.
    """
    rows, calls = settings.rows_and_calls
    effort = study.effort(settings)
    pairs, steps = len(settings.prompts) * len(settings.config.seeds), settings.sampling.steps
    measured = len(settings.measured_steps)
    kept = measured * calls
    repeated = kept * effort.repeats + measured * effort.conditional_repeats
    flops, weights, activations, call_bytes = _trace(settings, config_file, rows)
    sampling = settings.sampling
    pixels = sampling.frames * sampling.height * sampling.width * 3
    return StudyPlan(
        pairs=pairs, videos=1 + effort.videos + 2 * effort.together, repeats=repeated,
        calls=pairs * (calls * steps * (1 + effort.videos + effort.together) + repeated),
        wide_calls=pairs * calls * steps * effort.together,
        flops=flops, weights=weights, activations=activations, disk=pairs * (pixels + kept * call_bytes),
    )  # fmt: skip


def _trace(settings: StudySettings, config_file: Path, rows: int) -> tuple[int, int, int, int]:
    """Operations of a call of `rows` rows, bytes of the weights, of its activations, and of its inputs and output."""
    facts, sampling = settings.facts, settings.sampling
    dtype = getattr(torch, sampling.dtype)
    split_model = split_model_of(load_transformer(str(config_file), dtype=dtype, device="meta"))
    frames, height, width = settings.latent_size
    tokens = facts.longest_caption
    with warnings.catch_warnings(), FakeTensorMode(), UsageCounter() as counter, torch.no_grad():
        warnings.simplefilter("ignore")
        make_empty(split_model)
        counter.assign("weights", [*split_model.parameters(), *split_model.buffers()])
        x = torch.empty(rows, facts.channels, frames, height, width)
        pooled = None if facts.pooled_width is None else torch.empty(rows, facts.pooled_width)
        text = torch.empty(rows, tokens, facts.text_width)
        captions = Captions(text, torch.empty(rows, tokens, dtype=torch.bool), (tokens,) * rows, pooled)
        narrow = torch.autocast("cpu", dtype) if dtype != torch.float32 else torch.autocast("cpu", enabled=False)
        with counter.stage("call"), narrow:
            split_model(x, torch.empty(rows), captions)
    call_bytes = 4 * (2 * x.numel() + text.numel())
    return sum(counter.flops.values()), counter.parts["weights"], counter.peak("call"), call_bytes


def run(argv: Sequence[str]) -> None:
    """Prints the plan of `--study NAME` and its options.

    Raises:
        ValueError: if study, base or options are invalid.
    """
    words = list(argv)
    place = words.index("--study")
    kind = study_class(words[place + 1] if place + 1 < len(words) else "")
    parser = CommandParser(prog="reblock plan --study", description="forward passes, memory and disk of a study")
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_argument("--json", type=Path | None, default=None, help="also write all figures to this file")
    parser.add_class_arguments(StudyConfig, as_group=False)
    parser.add_class_arguments(Hardware, "hardware")
    own = parser.add_class_arguments(kind, as_group=False)
    with tempfile.TemporaryDirectory() as nowhere:
        options = [*words[:place], *words[place + 2 :]]
        given = parser.instantiate_classes(parser.parse_args([f"--out={nowhere}", *options]))
    study = kind(**{name: given[name] for name in own})
    config = StudyConfig(**{name: given[name] for name in StudyConfig.__dataclass_fields__})
    file = base_config(str(DEMO_BASE) if config.base is None else config.base)
    settings = StudySettings(config, read_config(str(file)))
    plan = plan_study(study, settings, file)
    _show(study, settings, plan, given["hardware"])
    if given["json"] is not None:
        write_json(given["json"], asdict(plan) | {"study": study.name, "total_flops": plan.total_flops})


def _show(study: Study, settings: StudySettings, plan: StudyPlan, hardware: Hardware) -> None:
    rate = hardware.flops(settings.sampling.dtype != "float32")
    seconds = plan.total_flops / rate
    memory = plan.weights + plan.activations
    print = Console(highlight=False, soft_wrap=True).print
    print(f"Study {study.name} on {settings.facts.family}, {settings.facts.num_blocks} blocks, {settings.describe()}")
    print(
        f"{plan.pairs} pairs of prompt and seed; for each {plan.videos} videos, and {plan.repeats:,} calls repeated "
        "with other attention"
    )
    print(
        f"{plan.calls:,} calls of the transformer of {short(plan.flops / 1e12)} TFLOP, "
        f"{short(plan.total_flops / 1e15)} PFLOP in all"
    )
    print(
        f"{short(seconds / 3600)} GPU hours at {hardware.share:.0%} of {hardware.tflops:g} TFLOP/s in 16 bits "
        f"({hardware.tflops_float32:g} in float32); attention statistics, text encoder and VAE are not counted"
    )
    print(f"Memory {gib(memory)}: weights {gib(plan.weights)}, a call {gib(plan.activations)}")
    print(f"Disk {gib(plan.disk)} for the dense drawings, their pixels not compressed")
