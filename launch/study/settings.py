"""What options and a transformer's config say of a study, before anything is loaded or needs to be here."""

from collections.abc import Mapping, Sequence
from typing import Any

from data.families import family_titled
from launch.sample.generate import SamplingConfig
from launch.sample.pipelines import PipelineUse, family_use
from launch.study.config import DEMO_STEPS, PROMPTS, StudyConfig, read_prompts
from trainer.models.facts import ModelFacts
from trainer.models.load import read_facts


class StudySettings:
    """Prompts, sizes, layers and heads of a study.

    Args:
        config: options of every study.
        transformer: the transformer's config, as `read_config` gives it.

    Raises:
        ValueError: if prompts, sizes or choices are invalid.
    """

    def __init__(self, config: StudyConfig, transformer: Mapping[str, Any]) -> None:
        self.config, self.transformer_config = config, dict(transformer)
        self.facts: ModelFacts = read_facts(self.transformer_config)
        self.use: PipelineUse = family_use(family_titled(self.facts.family))
        self.prompts: Sequence[str] = PROMPTS if config.prompts is None else read_prompts(config.prompts)
        steps = DEMO_STEPS if config.base is None else self.use.steps
        self.sampling = SamplingConfig(
            seed=0, steps=config.steps or steps, frames=config.frames or self.use.frames,
            guidance=self.use.guidance if config.guidance is None else config.guidance,
            height=config.height, width=config.width, fps=config.fps, dtype=config.dtype,
        )  # fmt: skip
        self.sampling.check(self.use.family)
        self._check_choices()

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

    @property
    def heads(self) -> int:
        """Attention heads of a block."""
        return int(self.transformer_config["num_attention_heads"])

    @property
    def layers(self) -> list[int]:
        """The blocks that are studied."""
        return list(range(self.facts.num_blocks)) if self.config.layers is None else sorted(self.config.layers)

    @property
    def studied_heads(self) -> list[int]:
        """The heads of a block that are studied."""
        return list(range(self.heads)) if self.config.heads is None else sorted(self.config.heads)

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, height, width) of the vision tokens of a video."""
        t, y, x = (size // patch for size, patch in zip(self.latent_size, self.facts.patch, strict=True))
        return t, y, x

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(F, H, W) of a video's latent."""
        sampling = self.sampling
        return (sampling.frames - 1) // self.use.family.frame_stride + 1, sampling.height // 8, sampling.width // 8

    @property
    def rows_and_calls(self) -> tuple[int, int]:
        """Rows of a call of the transformer, and calls of a denoising step."""
        if self.use.guided == "embedded" or self.sampling.guidance <= 1:
            return 1, 1
        return (2, 1) if self.use.guided == "batch" else (1, 2)

    def describe(self) -> str:
        """Sizes and settings of the videos, in words."""
        sampling = self.sampling
        return (
            f"{len(self.prompts)} prompts, seeds {', '.join(map(str, self.config.seeds))}; {sampling.frames} x "
            f"{sampling.height} x {sampling.width}, {sampling.steps} steps, guidance {sampling.guidance:g}, "
            f"{sampling.dtype}; measured at steps {', '.join(map(str, self.measured_steps))}"
        )

    @property
    def measured_steps(self) -> list[int]:
        """Denoising steps whose calls are kept: the middles of equal parts of all steps."""
        steps, count = self.sampling.steps, self.config.measured_steps
        return sorted({int((i + 0.5) * steps / count) for i in range(count)})
