"""The families of video models whose clips and captions can be encoded: names, classes and sizes.

docs/models.md has their conventions, with sources.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VideoFamily:
    """What encoding has to know of a family before anything is loaded.

    Args:
        name: in options and indexes.
        title: in messages; `family` of its class in `trainer.models`.
        pipeline: diffusers' class of its pipeline.
        vae: diffusers' class of its VAE.
        text_encoders: folder of the base -> transformers' class of each text encoder.
        frame_step: a clip has `frame_step` k + 1 frames.
        frame_stride: the VAE makes one latent frame of so many frames, after the first. Sides shrink by 8 in all
            families.
        text_tokens: of the longest caption.
        clip: (frames, height, width) of usual clips, for examples in messages.
        encodes_empty: whether a sample without its caption has an encoded empty caption in its place;
            `empty_caption` of its class in `trainer.models` says what the others have.
    """

    name: str
    title: str
    pipeline: str
    vae: str
    text_encoders: Mapping[str, str]
    frame_step: int
    frame_stride: int
    text_tokens: int
    clip: tuple[int, int, int]
    encodes_empty: bool = False

    @property
    def has_pooled(self) -> bool:
        """Whether the transformer takes a pooled embedding of a caption, which the second text encoder makes."""
        return len(self.text_encoders) > 1

    @property
    def tokenizers(self) -> list[str]:
        """Folders of the base, one for each text encoder."""
        return [part.replace("text_encoder", "tokenizer") for part in self.text_encoders]


MOCHI = VideoFamily(
    "mochi", "Mochi", "MochiPipeline", "AutoencoderKLMochi", {"text_encoder": "T5EncoderModel"}, 6, 6, 256,
    (163, 480, 848),
)  # fmt: skip
WAN = VideoFamily(
    "wan", "Wan 2.1", "WanPipeline", "AutoencoderKLWan", {"text_encoder": "UMT5EncoderModel"}, 4, 4, 512,
    (81, 480, 832), encodes_empty=True,
)  # fmt: skip
HUNYUAN_VIDEO = VideoFamily(
    "hunyuan_video", "HunyuanVideo", "HunyuanVideoPipeline", "AutoencoderKLHunyuanVideo",
    {"text_encoder": "LlamaModel", "text_encoder_2": "CLIPTextModel"}, 4, 4, 256,
    (129, 544, 960), encodes_empty=True,
)  # fmt: skip
#: Its VAE also takes 4 k + 1 frames, but works in pieces of 8 and is made for 8 k + 1.
COGVIDEOX = VideoFamily(
    "cogvideox", "CogVideoX", "CogVideoXPipeline", "AutoencoderKLCogVideoX", {"text_encoder": "T5EncoderModel"},
    8, 4, 226, (49, 480, 720),
)  # fmt: skip

#: Family of shards whose index names none, as before there were others; the default of options.
DEFAULT_FAMILY = MOCHI

VIDEO_FAMILIES = {family.name: family for family in (MOCHI, WAN, HUNYUAN_VIDEO, COGVIDEOX)}


def family_named(name: str) -> VideoFamily:
    """A family by its name.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in VIDEO_FAMILIES:
        raise ValueError(f"got family {name!r}, expected one of {', '.join(VIDEO_FAMILIES)}.")
    return VIDEO_FAMILIES[name]


def index_family(index: Mapping[str, Any]) -> VideoFamily:
    """The family that shards were made for, from their index; one without a family is the default's.

    Raises:
        ValueError: if this version does not know it.
    """
    return family_named(index.get("family", DEFAULT_FAMILY.name))


def family_titled(title: str) -> VideoFamily:
    """The family of this title, as `ModelFacts.family` gives it."""
    return next(family for family in VIDEO_FAMILIES.values() if family.title == title)
