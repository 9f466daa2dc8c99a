"""The families of video diffusion transformers, by diffusers' class of the transformer."""

from collections.abc import Mapping
from typing import Any

from trainer.models.cogvideox import SplitCogVideoX
from trainer.models.hunyuan_video import SplitHunyuanVideo
from trainer.models.mochi import SplitMochi
from trainer.models.split_model import SplitModel
from trainer.models.wan import SplitWan

#: Class name in a transformer's config -> the family.
FAMILIES: dict[str, type[SplitModel]] = {
    family.transformer_class.__name__: family for family in (SplitMochi, SplitWan, SplitHunyuanVideo, SplitCogVideoX)
}


def family_of(config: Mapping[str, Any]) -> type[SplitModel]:
    """The family of a transformer's config, as `trainer.models.load.read_config` gives it."""
    return FAMILIES[config["_class_name"]]


def split_model_of(
    transformer: Any,
    *,
    scheduler: Mapping[str, Any] | None = None,
    stock_attention: bool = False,
    checkpoint_blocks: bool = False,
) -> SplitModel:
    """A transformer of any family, to be run in parts; arguments as of `SplitModel`."""
    family = FAMILIES[type(transformer).__name__]
    return family(
        transformer, scheduler=scheduler, stock_attention=stock_attention, checkpoint_blocks=checkpoint_blocks
    )
