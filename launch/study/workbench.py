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
from launch.sample.generate import Pixels
from launch.sample.pipelines import check_pipeline
from launch.study.config import DEMO_BASE, StudyConfig
from launch.study.denoising import CONDITIONAL, Denoiser, Functions, ModelCall
from launch.study.settings import StudySettings
from trainer.models.layout import Site
from trainer.models.load import read_config, transformer_weight_files

#: Added to a seed for the next prompt's noise; larger than differences between seeds that anyone chooses.
_OF_NEXT_PROMPT = 1_000_003


def weights_identity(base: Path) -> list[list[Any]]:
    """Names, sizes and times of the files of a base's transformer, which change if they are written again."""
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in transformer_weight_files(str(base))]


class DenseDrawing(NamedTuple):
    """A video drawn with the base's own attention, and some of the calls that made it."""

    pixels: Pixels
    calls: list[ModelCall]


class Workbench(StudySettings):
    """The base, prompts and settings of a study, and its folder's dense drawings.

    Args:
        config: of the study.
        model: pipeline folder to work on in place of the config's base, with dense drawings of its own.

    Raises:
        ValueError: if base, prompts or sizes are invalid; nothing is loaded.
    """

    def __init__(self, config: StudyConfig, model: str | None = None) -> None:
        name = model or config.base
        self.base = resolve_base(name) if name is not None else DEMO_BASE
        check_pipeline(self.base)
        super().__init__(config, read_config(str(self.base)))
        self._last: tuple[tuple[int, int], DenseDrawing] | None = None

    @property
    def passes(self) -> list[str]:
        """The passes of guidance that the base's pipeline runs; known once something was drawn."""
        done = next(self.dense_folder.glob("*/done.json"))
        return json.loads(done.read_text())["passes"]

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the dense drawings."""
        weights = weights_identity(self.base)
        said = {
            "base": str(self.base), "weights": weights, "prompts": list(self.prompts),
            "sampling": asdict(self.sampling), "measured_steps": self.measured_steps,
        }  # fmt: skip
        return said | ({"own_noise": True} if self.config.own_noise else {})

    # -- what is drawn -----------------------------------------------------------------------------------------------

    @cached_property
    def denoiser(self) -> Denoiser:
        """The loaded base."""
        return Denoiser(self.base, self.sampling, self.config.device)

    def noise_seed(self, prompt: int, seed: int) -> int:
        """The seed of the noise that a prompt is drawn with."""
        return seed + _OF_NEXT_PROMPT * prompt if self.config.own_noise else seed

    def draw(
        self, prompt: int, seed: int, functions: Functions | None = None, *, site: Site | None = None
    ) -> Pixels:  # fmt: skip
        """Draws a prompt's video, with other attention in some layers, at a site of `SplitModel.attention`."""
        return self.denoiser.draw(self.prompts[prompt], self.noise_seed(prompt, seed), functions, site=site)

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

        pixels = self.denoiser.draw(self.prompts[prompt], self.noise_seed(prompt, seed), on_call=keep)
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

    def conditional_calls(self, prompt: int, seed: int) -> list[ModelCall]:
        """The kept calls of a dense drawing that have the conditional pass, one for each measured step."""
        return [call for call in self.dense(prompt, seed).calls if CONDITIONAL in call.passes]

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
