"""Frames of a clip as an array.

Legend: T frames, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data.video.container import clip_name
from data.video.frame_readers import read_frames
from data.video.stream_info import read_stream_info


def decode_video(
    source: Path | bytes,
    frames: int | Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> NDArray[np.uint8]:
    """Frames of a clip in presentation order, upright, (T, H, W, 3) RGB.

    A clip of another size is scaled until it covers (height, width) and cropped about its centre.

    Args:
        source: a file, or a file's bytes.
        frames: number of frames from the first on, or the indices of the frames; None takes all.
        height: of the result; None keeps the clip's.
        width: of the result; None keeps the clip's.

    Raises:
        ValueError: if the clip cannot be decoded or has too few frames. Damage after the last requested frame does not
            matter.
    """
    info = read_stream_info(source)
    if frames is None and info.truncation:
        raise ValueError(f"{clip_name(source)} cannot be decoded ({info.truncation}); use a whole video.")
    count = info.frames if frames is None else frames
    wanted = np.arange(count) if isinstance(count, int) else np.asarray(count, dtype=np.int64)
    if not wanted.size or wanted.min() < 0:
        raise ValueError(f"got frames {frames}; expected at least one, numbered from 0.")
    if info.frames <= wanted.max():
        raise ValueError(
            f"{clip_name(source)} has {info.frames} frames, expected at least {wanted.max() + 1}; use longer clips."
        )
    ascending, positions = np.unique(wanted, return_inverse=True)
    parts = [
        cover(picture[None], height or picture.shape[0], width or picture.shape[1])
        for picture in read_frames(source, info, ascending.tolist())
    ]
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"{clip_name(source)} changes its size from frame to frame; give a height and a width.")
    video = np.concatenate(parts)
    return video if np.array_equal(ascending, wanted) else video[positions]


def cover(video: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Scales (T, H, W, 3) with antialiasing until it covers (height, width), and crops about the centre."""
    old_height, old_width = video.shape[1:3]
    if (old_height, old_width) == (height, width):
        return video
    scale = max(height / old_height, width / old_width)
    size = (max(height, round(old_height * scale)), max(width, round(old_width * scale)))
    pixels = torch.from_numpy(video).permute(0, 3, 1, 2).float()
    scaled = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = scaled[:, :, top : top + height, left : left + width]
    return cropped.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
