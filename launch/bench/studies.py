"""`reblock bench studies`: seconds and peak memory of every kind of unit of every study, with random weights."""

import json
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from launch.bench.result import BenchResult, choose_device
from launch.demo.assemble_base import small_text_encoder
from launch.study.command import STUDIES, run_study, study_class
from launch.study.config import DEMO_BASE, StudyConfig
from launch.study.study import Measured, Study, Unit
from launch.study.workbench import Workbench
from trainer.models.families import family_of
from trainer.models.load import load_transformer, read_config

#: Options with which every kind of unit of a study is measured, and none often.
_FEW: dict[str, dict[str, Any]] = {
    "masking": {"ratios": (0.5,), "video_ratios": (0.5,)},
    "profile": {"ratios": (0.5,)},
    "temperature": {"temperatures": (0.5, 1.0), "video_temperatures": (0.5,), "video_layers": (0,)},
    "skip-sinks": {"sink_heads": ("0:0",), "draws": 1},
    "retraining": {"ratios": (0.5,)},
    "first-token": {"videos": False},  # they take as long as other studies'
}
#: Studies of pairs of prompts.
_TWO_PROMPTS = ("transfer",)


def write_pipeline(out: Path, config_json: Path, dtype: torch.dtype, device: str) -> None:
    """Writes the demo's pipeline folder with a transformer of another config, whose weights are random."""
    config = read_config(str(config_json))
    pipe: Any = DiffusionPipeline.from_pretrained(DEMO_BASE, torch_dtype=torch.float32)
    if family_of(config).transformer_class is not type(pipe.transformer):
        raise ValueError(f"got {config_json} of {config['_class_name']}, expected a {type(pipe.transformer).__name__}.")
    pipe.register_modules(
        transformer=load_transformer(str(config_json), dtype=dtype, device=device),
        text_encoder=small_text_encoder(len(pipe.tokenizer), config["text_embed_dim"], 0),
    )
    pipe.save_pretrained(out, safe_serialization=True)


class Timed:
    """A study whose units are timed.

    Args:
        study: the study.
        device: that it runs on.
    """

    def __init__(self, study: Study, device: torch.device) -> None:
        self.study, self.device = study, device
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.peak: dict[str, float] = {}
        self._measure = study.measure
        study.measure = self._timed  # type: ignore[method-assign]

    def _timed(self, unit: Unit, work: Workbench) -> Measured:
        work.dense(unit.prompt, unit.seed)  # drawn beforehand, and for all studies once
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        found = self._measure(unit, work)
        if cuda:
            torch.cuda.synchronize()
        kind = unit.variant.rstrip("0123456789.").rstrip("-") or unit.variant
        self.seconds[kind].append(time.perf_counter() - start)
        if cuda:
            self.peak[kind] = max(self.peak.get(kind, 0.0), torch.cuda.max_memory_allocated() / 2**30)
        return found

    def rows(self) -> list[list[str]]:
        """A row for each kind of unit."""
        return [
            [self.study.name, kind, str(len(seconds)), f"{statistics.median(seconds):.3g}", f"{max(seconds):.3g}",
             f"{self.peak[kind]:.1f}" if kind in self.peak else "-"]
            for kind, seconds in self.seconds.items()
        ]  # fmt: skip


def run(
    *,
    device: str = "auto",
    config_json: Path | None = None,
    frames: int = 7,
    height: int = 32,
    width: int = 32,
    steps: int = 2,
    layers: tuple[int, ...] = (0, 4),
    heads: tuple[int, ...] = (0, 1),
    dtype: str = "float32",
    studies: tuple[str, ...] = tuple(STUDIES),
) -> BenchResult:
    """Runs the studies with few options on one prompt, or two where they need two, and times their units.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        config_json: config of a Mochi transformer, which gets random weights; the demo's base by default.
        frames: frames of a video, 6k + 1.
        height: height in pixels, a multiple of 16.
        width: width in pixels, a multiple of 16.
        steps: denoising steps, of which one is measured.
        layers: studied layers.
        heads: studied heads, where a study takes them one by one.
        dtype: dtype of the weights.
        studies: names of the studies.
    """
    device = choose_device(device)
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base, prompts = DEMO_BASE, Path(scratch, "prompts.txt")
        captions = ("a red circle moves right over a dark gray background", "a blue star moves up")
        prompts.write_text(f"{captions[0]}\n")
        Path(scratch, "two.txt").write_text("\n".join(captions))
        if config_json is not None:
            base = Path(scratch, "base")
            start = time.perf_counter()
            write_pipeline(base, config_json, getattr(torch, dtype), device)
            print(f"wrote a pipeline with random weights in {time.perf_counter() - start:.0f} s", flush=True)
        config = StudyConfig(
            out=Path(scratch, "out"), base=str(base), prompts=prompts, steps=steps, frames=frames, height=height,
            width=width, measured_steps=1, layers=layers, heads=heads, device=device, dtype=dtype,
        )  # fmt: skip
        work = Workbench(config)
        start = time.perf_counter()
        denoiser = work.denoiser
        print(f"loaded in {time.perf_counter() - start:.0f} s", flush=True)
        start = time.perf_counter()
        work.dense(0, 0)
        dense = time.perf_counter() - start
        for name in studies:
            own, bench = config, work
            if name in _TWO_PROMPTS:
                own = replace(config, prompts=Path(scratch, "two.txt"))
                bench = Workbench(own)
                bench.__dict__["denoiser"] = denoiser  # the model that is loaded already
            timed = Timed(study_class(name)(**_FEW.get(name, {})), torch.device(device))
            run_study(timed.study, own, _FEW.get(name, {}), bench)
            rows += timed.rows()
            print(json.dumps(timed.rows()), flush=True)
    tokens = 1
    for size in work.grid:
        tokens *= size
    return BenchResult(
        title=f"Units of the studies, {work.facts.num_blocks} blocks, {frames} x {height} x {width} ({tokens:,} vision "
        f"tokens), {steps} steps, guidance {work.sampling.guidance:g}, {dtype}",
        columns=("study", "unit", "units", "median (s)", "longest (s)", "peak memory (GiB)"),
        rows=rows,
        notes=(
            f"Layers {list(layers)}, heads {list(heads)} one by one; one measured step. A dense drawing took "
            f"{dense:.3g} s and is not in the rows. Text encoder and VAE are small.",
        ),
        device=device,
    )
