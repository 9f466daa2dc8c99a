"""What studies work with: the base, the dense drawings that serve as references, and the calls kept of them.

Legend: B rows of a call, T frames, H W pixels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from data.base_folder import resolve_base
from data.files import atomic_file, settings_hash, write_json
from data.video.write import write_video
from launch.sample.command import CAPTIONS
from launch.sample.generate import Pixels, SamplingConfig
from launch.sample.pipelines import PipelineUse, check_pipeline
from launch.study.config import DEMO_BASE, StudyConfig, read_prompts
from launch.study.denoising import Denoiser, Functions, ModelCall
from trainer.models.facts import ModelFacts
from trainer.models.layout import Site
from trainer.models.load import read_config, read_facts, transformer_weight_files


class DenseDrawing(NamedTuple):
    """A video drawn with the base's own attention, and some of the calls that made it."""

    pixels: Pixels
    calls: list[ModelCall]


class Workbench:
    """The base, prompts and settings of a study, and its folder's dense drawings.

    Args:
        config: of the study.
        model: pipeline folder to work on in place of the config's base, with dense drawings of its own.

    Raises:
        ValueError: if base, prompts or sizes are invalid; nothing is loaded.
    """

    def __init__(self, config: StudyConfig, model: str | None = None) -> None:
        self.config = config
        name = model or config.base
        self.base = resolve_base(name) if name is not None else DEMO_BASE
        self.use: PipelineUse = check_pipeline(self.base)
        self.facts: ModelFacts = read_facts(read_config(str(self.base)))
        self.prompts: Sequence[str] = CAPTIONS if config.prompts is None else read_prompts(config.prompts)
        self.sampling = SamplingConfig(
            seed=0, steps=config.steps or self.use.steps, frames=config.frames or self.use.frames,
            guidance=self.use.guidance if config.guidance is None else config.guidance,
            height=config.height, width=config.width, fps=config.fps, dtype=config.dtype,
        )  # fmt: skip
        self.sampling.check(self.use.family)
        self._check_choices()
        self._last: tuple[tuple[int, int], DenseDrawing] | None = None

    def _check_choices(self) -> None:
        config, faults = self.config, []
        if not config.seeds or len(set(config.seeds)) != len(config.seeds):
            faults.append(f"got seeds {list(config.seeds)}, expected one or more, each once")
        if not 1 <= config.measured_steps <= self.sampling.steps:
            faults.append(f"got measured_steps {config.measured_steps}, expected 1 to {self.sampling.steps}")
        for kind, chosen, count in (
            ("layers", config.layers, self.facts.num_blocks),
            ("heads", config.heads, self.heads),
        ):
            if chosen is not None and (not chosen or set(chosen) - set(range(count)) or len(set(chosen)) < len(chosen)):
                faults.append(f"got {kind} {list(chosen)}, expected different ones of 0 .. {count - 1}")
        if faults:
            raise ValueError("; ".join(faults) + ".")

    # -- what the base is --------------------------------------------------------------------------------------------

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(read_config(str(self.base))["num_attention_heads"])

    @property
    def layers(self) -> list[int]:
        """The blocks that are studied."""
        return list(range(self.facts.num_blocks)) if self.config.layers is None else sorted(self.config.layers)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, height, width) of the vision tokens of a video."""
        frames = (self.sampling.frames - 1) // self.use.family.frame_stride + 1
        cells = frames, self.sampling.height // 8, self.sampling.width // 8
        t, y, x = (size // patch for size, patch in zip(cells, self.facts.patch, strict=True))
        return t, y, x

    @property
    def measured_steps(self) -> list[int]:
        """Denoising steps whose calls are kept: the middles of equal parts of all steps."""
        steps, count = self.sampling.steps, self.config.measured_steps
        return sorted({int((i + 0.5) * steps / count) for i in range(count)})

    @property
    def passes(self) -> list[str]:
        """The passes of guidance that the base's pipeline runs; known once something was drawn."""
        done = next(self.dense_folder.glob("*/done.json"))
        return json.loads(done.read_text())["passes"]

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the dense drawings."""
        weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in
                   transformer_weight_files(str(self.base))]  # fmt: skip
        return {
            "base": str(self.base), "weights": weights, "prompts": list(self.prompts),
            "sampling": asdict(self.sampling), "measured_steps": self.measured_steps,
        }  # fmt: skip

    # -- what is drawn -----------------------------------------------------------------------------------------------

    @cached_property
    def denoiser(self) -> Denoiser:
        """The loaded base."""
        return Denoiser(self.base, self.sampling, self.config.device)

    def draw(
        self, prompt: int, seed: int, functions: Functions | None = None, *, site: Site | None = None
    ) -> Pixels:  # fmt: skip
        """Draws a prompt's video, with other attention in some layers, at a site of `SplitModel.attention`."""
        return self.denoiser.draw(self.prompts[prompt], seed, functions, site=site)

    def again(self, call: ModelCall, functions: Functions | None = None, *, site: Site | None = None) -> Tensor:
        """The prediction of a call's inputs, with other attention in some layers."""
        return self.denoiser.again(call, functions, site=site)

    @property
    def dense_folder(self) -> Path:
        """Where dense drawings of these settings are kept."""
        return self.config.out / "dense" / settings_hash(self.settings)

    def dense(self, prompt: int, seed: int) -> DenseDrawing:
        """A dense drawing; it is made once and kept in the folder of the study."""
        if self._last is not None and self._last[0] == (prompt, seed):
            return self._last[1]
        folder = self.dense_folder / f"{prompt:03d}-{seed}"
        if not (folder / "done.json").is_file():
            self._draw_dense(prompt, seed, folder)
        with np.load(folder / "pixels.npz", allow_pickle=False) as file:
            pixels = file["pixels"]
        calls = [ModelCall.read(path) for path in sorted(folder.glob("call-*.safetensors"))]
        self._last = (prompt, seed), DenseDrawing(pixels, calls)
        return self._last[1]

    def _draw_dense(self, prompt: int, seed: int, folder: Path) -> None:
        kept = 0
        passes: set[str] = set()

        def keep(call: ModelCall) -> None:
            nonlocal kept
            passes.update(call.passes)
            if call.step in self.measured_steps:
                call.write(folder / f"call-{kept:04d}.safetensors")
                kept += 1

        pixels = self.denoiser.draw(self.prompts[prompt], seed, on_call=keep)
        with atomic_file(folder / "pixels.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, pixels=pixels)
        write_video(folder / "video.mp4", pixels, self.sampling.fps)
        write_json(
            folder / "done.json",
            {"prompt": self.prompts[prompt], "seed": seed, "calls": kept, "passes": sorted(passes)},
        )

    # -- what is measured --------------------------------------------------------------------------------------------

    def relative_errors(
        self, call: ModelCall, functions: Functions, *, site: Site | None = None
    ) -> dict[str, float]:  # fmt: skip
        """D of each pass: |v - v_0|^2 / |v_0|^2 of the prediction with other attention and the dense one."""
        changed = self.again(call, functions, site=site).cpu().double()
        dense = call.prediction.double()
        errors: dict[str, float] = {}
        for name, rows in rows_by_pass(call.passes):
            errors[name] = float((changed[rows] - dense[rows]).square().sum() / dense[rows].square().sum())
        return errors

    def mean_errors(
        self, prompt: int, seed: int, functions: Functions, *, site: Site | None = None
    ) -> dict[str, float]:  # fmt: skip
        """`relative_errors`, means over the kept calls of a dense drawing."""
        found: dict[str, list[float]] = {}
        for call in self.dense(prompt, seed).calls:
            for name, error in self.relative_errors(call, functions, site=site).items():
                found.setdefault(name, []).append(error)
        return {name: sum(errors) / len(errors) for name, errors in found.items()}


def rows_by_pass(passes: Sequence[str]) -> Iterator[tuple[str, list[int]]]:
    """Each pass of a call with its rows."""
    for name in dict.fromkeys(passes):
        yield name, [row for row, own in enumerate(passes) if own == name]
