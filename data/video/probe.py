"""Facts of a clip, read from its packets.

Legend: T frames.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.video.container import clip_name
from data.video.stream_info import read_stream_info


@dataclass(frozen=True)
class VideoInfo:
    """Facts of a clip.

    Args:
        frames: number of frames that can be read.
        fps: frames per second, on average.
        height: as displayed, in pixels.
        width: as displayed, in pixels.
        codec: FFmpeg's name, such as "h264".
        duration: seconds, including the last frame.
        rotation: degrees clockwise by which a player turns the stored pictures: 0, 90, 180 or 270.
        variable: whether the time between frames varies.
    """

    frames: int
    fps: float
    height: int
    width: int
    codec: str
    duration: float
    rotation: int = 0
    variable: bool = False


def probe_video(source: Path | bytes) -> VideoInfo:
    """Facts of a clip. Its packets are counted, whatever its header says, and its first frame is decoded.

    Args:
        source: a file, or a file's bytes.

    Raises:
        ValueError: if the clip cannot be decoded, or its container lists frames that are missing.
    """
    return probe_times(source)[0]


def probe_times(source: Path | bytes) -> tuple[VideoInfo, NDArray[np.float64]]:
    """`probe_video`, and when each frame is shown: (T,) seconds from the first frame, ascending."""
    stream = read_stream_info(source)
    if stream.truncation:
        raise ValueError(f"{clip_name(source)} {stream.truncation}; use a whole video.")
    height, width = stream.displayed
    info = VideoInfo(
        frames=stream.frames,
        fps=stream.fps,
        height=height,
        width=width,
        codec=stream.codec,
        duration=stream.duration,
        rotation=stream.orientation.rotation,
        variable=stream.variable,
    )
    return info, stream.times
