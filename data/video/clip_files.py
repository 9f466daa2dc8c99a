"""Reading clips with decord and PyAV, writing them with PyAV.

Legend: T frames, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data.files import atomic_file
from data.video.container import name_of, scan
from data.video.frames import pictures


@dataclass(frozen=True)
class VideoInfo:
    """What a clip is.

    Args:
        frames: number of frames that can be read.
        fps: frames per second, on average.
        height: as displayed, in pixels.
        width: as displayed, in pixels.
        codec: FFmpeg's name, such as "h264".
        duration: seconds, the last frame's included.
        rotation: degrees clockwise by which the stored pictures are turned for display: 0, 90, 180 or 270.
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
    """What a clip is. Its packets are counted, whatever its header says, and its first frame is decoded.

    Args:
        source: a file, or a file's bytes.

    Raises:
        ValueError: if the clip cannot be decoded, or its container promises frames that are not there.
    """
    return probe_times(source)[0]


def probe_times(source: Path | bytes) -> tuple[VideoInfo, NDArray[np.float64]]:
    """`probe_video` and `frame_times` in one reading."""
    contents = scan(source)
    if contents.complaint:
        raise ValueError(f"{name_of(source)} {contents.complaint}; use a whole video.")
    info = VideoInfo(
        contents.frames,
        contents.fps,
        *contents.displayed,
        contents.codec,
        contents.duration,
        contents.orientation.rotation,
        contents.variable,
    )
    return info, contents.times


def frame_times(source: Path | bytes) -> NDArray[np.float64]:
    """When each frame is shown, (frames,) seconds from the first, ascending.

    Raises:
        ValueError: if the clip cannot be read.
    """
    return scan(source).times


def window_indices(
    times: NDArray[np.float64], frames: int, fps: float | None = None, start: float = 0.0
) -> list[int] | None:
    """Indices of the frames that are shown nearest to start, start + 1 / fps, start + 2 / fps, ...

    A clip of fewer frames per second than `fps` gives some of them twice.

    Args:
        times: (T,) of the clip, seconds, ascending.
        frames: how many indices.
        fps: of the window; None takes every frame from the one nearest to `start`.
        start: seconds from the first frame.

    Returns:
        `frames` indices, ascending; None if the clip ends before.

    Raises:
        ValueError: if frames < 1, fps <= 0 or start < 0.
    """
    if frames < 1 or fps is not None and not fps > 0 or not start >= 0:
        raise ValueError(f"got frames {frames}, fps {fps}, start {start}; expected frames >= 1, fps > 0, start >= 0.")
    wanted = start + (np.arange(frames) / fps if fps else np.zeros(1))
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if wanted[-1] > times[-1] + step / 2 + 1e-9:
        return None
    after = np.searchsorted(times, wanted).clip(1, max(len(times) - 1, 1))
    # Of two frames equally near, the earlier; a rounding error must not decide.
    nearest = [int(i) if i < len(times) and times[i] - w < w - times[i - 1] - 1e-9 else int(i) - 1
               for i, w in zip(after, wanted, strict=True)]  # fmt: skip
    if fps is not None:
        return nearest
    return list(range(nearest[0], nearest[0] + frames)) if nearest[0] + frames <= len(times) else None


def decode_video(
    source: Path | bytes,
    frames: int | Sequence[int] | None = None,
    height: int | None = None,
    width: int | None = None,
) -> NDArray[np.uint8]:
    """Frames of a clip in order of presentation, upright, (T, H, W, 3) RGB.

    A clip of another size is scaled until it covers (height, width), then cropped about its centre.

    Args:
        source: a file, or a file's bytes.
        frames: how many of the first, or the indices of the frames; None takes all.
        height: of the result; None keeps the clip's.
        width: of the result; None keeps the clip's.

    Raises:
        ValueError: if the clip cannot be decoded or is shorter than asked for; damage behind the last frame that is
            asked for does not matter.
    """
    contents = scan(source)
    if frames is None and contents.complaint:
        raise ValueError(f"{name_of(source)} cannot be decoded ({contents.complaint}); use a whole video.")
    count = contents.frames if frames is None else frames
    wanted = np.arange(count) if isinstance(count, int) else np.asarray(count, dtype=np.int64)
    if not wanted.size or wanted.min() < 0:
        raise ValueError(f"got frames {frames}; expected at least one, numbered from 0.")
    if contents.frames <= wanted.max():
        raise ValueError(
            f"{name_of(source)} has {contents.frames} frames, expected at least {wanted.max() + 1}; use longer clips."
        )
    order, where = np.unique(wanted, return_inverse=True)
    parts = [
        cover(picture[None], height or picture.shape[0], width or picture.shape[1])
        for picture in pictures(source, contents, order.tolist())
    ]
    if len({part.shape for part in parts}) > 1:
        raise ValueError(f"{name_of(source)} changes its size from frame to frame; give a height and a width.")
    video = np.concatenate(parts)
    return video if np.array_equal(order, wanted) else video[where]


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
    with atomic_file(Path(path)) as temporary:
        _encode(temporary, frames, fps, crf)


def exact_x264() -> dict[str, str]:
    """Options with which x264 gives the same bytes for the same frames in every run.

    With AVX-512, x264 reads memory that nobody has written: two of a hundred small clips came out otherwise. What it
    gives with AVX2 does not vary. A processor without AVX-512 need not have AVX2 either.
    """
    return {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


def _encode(path: Path, frames: NDArray[np.uint8], fps: float, crf: int) -> None:
    # Several threads would give other bytes on another machine. No B-frames: every player shows the first frame.
    options = {"crf": str(crf), "preset": "veryfast", "threads": "1", "bf": "0"} | exact_x264()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
