"""Reading clips with decord and writing them with PyAV.

Legend: T frames, H W pixels.
"""

import io
import os
import re
import uuid
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import decord
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray


@dataclass(frozen=True)
class VideoInfo:
    """What a clip is, as decord sees it.

    Args:
        frames: number of frames.
        fps: frames per second, on average.
        height: pixels.
        width: pixels.
    """

    frames: int
    fps: float
    height: int
    width: int


def _name(source: Path | bytes) -> str:
    return f"clip of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _open(source: Path | bytes) -> decord.VideoReader:
    try:
        handle = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        reader = decord.VideoReader(handle, ctx=decord.cpu(0), num_threads=1)
    except (decord.DECORDError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{_name(source)} cannot be decoded ({_first_line(error)}); expected a whole video."
        ) from error
    if len(reader) == 0:
        raise ValueError(f"{_name(source)} holds no frame; expected a whole video.")
    return reader


def _first_line(error: BaseException) -> str:
    """What decord says, without the source lines and the stack trace of its C++."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", lines[0]).strip()


def _read(reader: decord.VideoReader, count: int, source: Path | bytes) -> NDArray[np.uint8]:
    """The first `count` frames, (T, H, W, 3)."""
    try:
        return reader.get_batch(range(count)).asnumpy()
    except (decord.DECORDError, RuntimeError, IndexError):
        # Two failures are decord's own: it takes the padding of narrow rows (16, 32, 48, 96 or 144 pixels) for more
        # channels; and it decodes ahead in a thread, so that damage behind the frames that are asked for is met or
        # not, by chance. Read one by one, the same clips are taken in every run.
        pass
    try:
        return _read_with_pyav(source, count)
    except (av.FFmpegError, IndexError) as error:
        raise ValueError(
            f"{_name(source)} cannot be decoded ({_first_line(error)}); expected a whole video."
        ) from error


def _read_with_pyav(source: Path | bytes, count: int) -> NDArray[np.uint8]:
    """The same pixels as decord's, one frame after another."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source), mode="r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        pixels = [frame.to_ndarray(format="rgb24") for frame in islice(container.decode(video=0), count)]
    if len(pixels) < count:
        raise IndexError(f"{len(pixels)} of {count} frames are there")
    return np.stack(pixels)


def probe_video(source: Path | bytes) -> VideoInfo:
    """Length, rate and size of a clip; its first frame is decoded, to know that it can be.

    Args:
        source: a file, or a file's bytes.

    Raises:
        ValueError: if the clip cannot be decoded.
    """
    reader = _open(source)
    height, width = _read(reader, 1, source).shape[1:3]
    return VideoInfo(len(reader), float(reader.get_avg_fps()), height, width)


def decode_video(
    source: Path | bytes, frames: int | None = None, height: int | None = None, width: int | None = None
) -> NDArray[np.uint8]:
    """The first frames of a clip, (T, H, W, 3) RGB.

    A clip of another size is scaled until it covers (height, width), then cropped about its centre.

    Args:
        source: a file, or a file's bytes.
        frames: how many; None takes all.
        height: of the result; None keeps the clip's.
        width: of the result; None keeps the clip's.

    Raises:
        ValueError: if the clip cannot be decoded or is shorter than `frames`.
    """
    reader = _open(source)
    count = len(reader) if frames is None else frames
    if len(reader) < count:
        raise ValueError(f"{_name(source)} has {len(reader)} frames, expected at least {count}; use longer clips.")
    video = _read(reader, count, source)
    return cover(video, height or video.shape[1], width or video.shape[2])


def cover(video: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Scales (T, H, W, 3) until it covers (height, width), antialiased, and crops about the centre."""
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


def write_video(path: Path | str, frames: NDArray[np.uint8], fps: float, *, crf: int = 16) -> None:
    """Writes an H.264 (yuv420p) mp4 that browsers play; the same frames give the same bytes.

    The file is written beside its place and renamed, so that a file at `path` is always whole.

    Args:
        path: file to write; its folder is made.
        frames: (T, H, W, 3) uint8 RGB; H and W even.
        fps: frames per second.
        crf: x264's quality, 0 (lossless) to 51.

    Raises:
        ValueError: if the frames have another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"got frames {frames.shape} {frames.dtype}, expected (T, H, W, 3) uint8.")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"got frames of {height}x{width}, expected an even height and width (yuv420p); crop by one.")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        _encode(beside, frames, fps, crf)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _encode(path: Path, frames: NDArray[np.uint8], fps: float, crf: int) -> None:
    # Several threads would give other bytes on another machine. No B-frames: every player shows the first frame.
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0"}
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
