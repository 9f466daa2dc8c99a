"""Writing clips with PyAV.

Legend: T frames, H W pixels.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray

from data.files import atomic_file

#: x264's quality, 0 (lossless) to 51.
_CRF = "16"


def write_video(path: Path | str, frames: NDArray[np.uint8], fps: float) -> None:
    """Writes an H.264 (yuv420p) mp4 that browsers play; equal frames give equal bytes. A file at `path` is complete.

    Args:
        path: file to write; its folder is made.
        frames: (T, H, W, 3) uint8 RGB; H and W even.
        fps: frames per second.

    Raises:
        ValueError: if the frames have another shape or dtype.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or 0 in frames.shape:
        raise ValueError(f"got frames {frames.shape} {frames.dtype}, expected (T, H, W, 3) uint8.")
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"got frames of {height}x{width}, expected an even height and width (yuv420p); crop by one.")
    with atomic_file(Path(path)) as temporary:
        _encode(temporary, frames, fps)


def deterministic_x264() -> dict[str, str]:
    """Options with which x264 gives the same bytes for the same frames in every run.

    With AVX-512, x264 reads memory that nothing has written: two of a hundred small clips differed between runs. Its
    output with AVX2 does not vary. A processor without AVX-512 may lack AVX2 too, so x264 chooses by itself there.
    """
    return {"x264-params": "asm=avx2"} if torch.backends.cpu.get_cpu_capability() == "AVX512" else {}


def _encode(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    # Several threads would give other bytes on another machine. Without B-frames, every player shows the first frame.
    options = {"crf": _CRF, "preset": "veryfast", "threads": "1", "bf": "0"} | deterministic_x264()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
