"""The encoder of captions of each family; diffusers' pipelines are imported only for the family that needs one."""

import importlib
from pathlib import Path

import torch

from data.encode.captions.caption_encoder import CaptionEncoder
from data.families import COGVIDEOX, HUNYUAN_VIDEO, MOCHI, WAN, VideoFamily

_MODULES = {
    MOCHI.name: ("data.encode.captions.mochi", "MochiCaptions"),
    WAN.name: ("data.encode.captions.wan", "WanCaptions"),
    HUNYUAN_VIDEO.name: ("data.encode.captions.hunyuan_video", "HunyuanVideoCaptions"),
    COGVIDEOX.name: ("data.encode.captions.cogvideox", "CogVideoXCaptions"),
}


def load_caption_encoder(
    family: VideoFamily, folder: Path, device: str, dtype: torch.dtype, max_tokens: int
) -> CaptionEncoder:
    """Loads the text encoders of a base; arguments as of `CaptionEncoder`.

    Raises:
        ValueError: if the weights do not fit their configs.
    """
    module, name = _MODULES[family.name]
    return getattr(importlib.import_module(module), name)(folder, device, dtype, max_tokens)
