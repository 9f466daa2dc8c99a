"""Videos drawn by a family's own pipeline, with every call of its transformer seen and repeatable.

A call can be repeated on the same inputs with other attention, which tells what an intervention changes at one
denoising step without the steps before it.

Legend: B rows of a call, T frames, H W pixels.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import write_bytes
from launch.sample.generate import Pixels, SamplingConfig, VideoSampler
from trainer.models.layout import AttentionFunction, Site

#: Names of the two passes of guidance, as measurements report them.
CONDITIONAL, UNCONDITIONAL = "conditional", "unconditional"

Functions = Mapping[int, AttentionFunction]


@dataclass(frozen=True)
class ModelCall:
    """One call of the transformer in a denoising loop.

    Args:
        step: denoising step, from 0.
        passes: of each of the B rows: `conditional` or `unconditional`.
        inputs: the call's tensors by argument; those of a tuple are `name.0`, `name.1`, ...
        prediction: what the model gave, (B, ...) float32.
    """

    step: int
    passes: tuple[str, ...]
    inputs: Mapping[str, Tensor]
    prediction: Tensor

    def write(self, path: Path) -> None:
        """Writes the call as a safetensors file."""
        tensors = {f"inputs.{name}": value for name, value in self.inputs.items()} | {"prediction": self.prediction}
        contiguous = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
        write_bytes(path, save(contiguous, {"step": str(self.step), "passes": " ".join(self.passes)}))

    @classmethod
    def read(cls, path: Path, device: torch.device | str = "cpu") -> "ModelCall":
        """Reads what `write` wrote."""
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            said = file.metadata()
        inputs = {name.removeprefix("inputs."): value for name, value in tensors.items() if name != "prediction"}
        return cls(int(said["step"]), tuple(said["passes"].split()), inputs, tensors["prediction"])


def _flat(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among a call's arguments, those of tuples by number."""
    found: dict[str, Tensor] = {}
    for name, value in inputs.items():
        parts = {f"{name}.{i}": part for i, part in enumerate(value)} if isinstance(value, tuple) else {name: value}
        found |= {key: part for key, part in parts.items() if isinstance(part, Tensor)}
    return found


def _nested(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of a call from what `_flat` gave."""
    found: dict[str, Any] = {}
    for key, value in tensors.items():
        name, dot, _ = key.partition(".")
        found[name] = (*found.get(name, ()), value) if dot else value
    return found


class Denoiser:
    """Draws videos and repeats calls of the transformer.

    Args:
        folder: complete diffusers pipeline folder.
        config: settings of every video.
        device: torch device.
    """

    def __init__(self, folder: Path, config: SamplingConfig, device: str) -> None:
        self.sampler = VideoSampler(folder, config, device)
        self.split_model = self.sampler.split_model
        #: Denoising step and passes of the call that runs now, for attention functions that depend on them.
        self.step = 0
        self.passes: tuple[str, ...] = ()

    def draw(
        self,
        caption: str,
        seed: int,
        functions: Functions | None = None,
        *,
        site: Site | None = None,
        on_call: Callable[[ModelCall], None] | None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Pixels:
        """Draws a video, (T, H, W, 3) uint8.

        Args:
            caption: of the video; it may be empty.
            seed: of the noise.
            functions: attention by layer, in place of dense attention.
            site: where in a block, as of `SplitModel.attention`.
            on_call: gets every call of the transformer, after it.
            on_step: is called after every denoising step.
        """
        self.step = 0

        def after_step() -> None:
            self.step += 1
            on_step()

        with self._watched(on_call), self.split_model.attention(functions or {}, site=site):
            return self.sampler.sample(caption, seed, {}, after_step)

    def draw_together(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        functions: Functions | None = None,
        *,
        on_call: Callable[[ModelCall], None] | None = None,
    ) -> list[Pixels]:
        """Draws videos in one batch, with a row for each caption in every pass.

        Args:
            captions: of the videos.
            seeds: of the noise of each.
            functions: as of `draw`.
            on_call: as of `draw`.
        """
        self.step = 0

        def after_step() -> None:
            self.step += 1

        with self._watched(on_call):
            return self.sampler.sample_batch(captions, seeds, functions or {}, after_step)

    @torch.no_grad()
    def again(self, call: ModelCall, functions: Functions | None = None, *, site: Site | None = None) -> Tensor:
        """The prediction (B, ...) float32 of the same inputs with other attention in some layers."""
        self.step, self.passes = call.step, call.passes
        inputs = {name: value.to(self.sampler.device) for name, value in call.inputs.items()}
        with self.split_model.attention(functions or {}, site=site):
            return self._transformer(**_nested(inputs), return_dict=False)[0].float()

    @property
    def _transformer(self) -> Any:
        return self.sampler.pipe.transformer

    @contextlib.contextmanager
    def _watched(self, on_call: Callable[[ModelCall], None] | None) -> Iterator[None]:
        """Inside, every call of the transformer sets `passes`, and is given to `on_call`."""
        transformer, pipe = self._transformer, self.sampler.pipe
        before = {
            name: transformer.__dict__[name] for name in ("forward", "cache_context") if name in vars(transformer)
        }
        forward, cache_context = transformer.forward, transformer.cache_context
        context = ""

        @contextlib.contextmanager
        def named_context(name: str, *arguments: Any, **options: Any) -> Iterator[None]:
            nonlocal context
            context = name  # diffusers' pipelines say here which pass follows
            with cache_context(name, *arguments, **options):
                yield

        def seen(**inputs: Any) -> Any:
            self.passes = _passes(context, len(inputs["hidden_states"]), guided=pipe.guidance_scale > 1)
            found = forward(**inputs)
            if on_call is not None:
                on_call(ModelCall(self.step, self.passes, _flat(inputs), found[0].float()))
            return found

        transformer.forward, transformer.cache_context = seen, named_context
        try:
            yield
        finally:
            for name in ("forward", "cache_context"):
                delattr(transformer, name)
            for name, value in before.items():
                setattr(transformer, name, value)


def _passes(context: str, rows: int, *, guided: bool) -> tuple[str, ...]:
    """The pass of each row, from the name that the pipeline gives the call."""
    if context == "uncond":
        return (UNCONDITIONAL,) * rows
    if context == "cond_uncond" and guided:  # in this order in Mochi's and CogVideoX's pipelines
        return (UNCONDITIONAL,) * (rows // 2) + (CONDITIONAL,) * (rows // 2)
    return (CONDITIONAL,) * rows
