"""Frames of a clip by index: decord where it is exact, PyAV elsewhere.

Legend: H W pixels.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import decord
import numpy as np
from numpy.typing import NDArray

from data.video.container import Contents, Orientation, decoded, name_of, opened, video_stream

#: Where decord's frames equal FFmpeg's own, pixel by pixel. It turns 10 bits into 8 in another way, and it gives the
#: frames of transport streams in a wrong order.
_DECORD_CONTAINERS = ("mov,mp4", "matroska", "avi")
_DECORD_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")

decord.logging.set_level(decord.logging.QUIET)  # what matters is in the errors


def pictures(source: Path | bytes, contents: Contents, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Frames as they are displayed, (H, W, 3) RGB each.

    Args:
        source: a file, or a file's bytes.
        contents: of the clip.
        indices: of the frames, ascending, each once; frame 0 is the first that is shown.

    Raises:
        ValueError: if the clip cannot be decoded that far.
    """
    done = 0
    # Of frames that lie apart, or behind a key frame, PyAV decodes fewer.
    if _suits_decord(contents) and 2 * len(indices) > indices[-1]:
        try:
            for picture in _with_decord(source, contents, indices):
                yield picture
                done += 1
        except (decord.DECORDError, RuntimeError, OSError, StopIteration):
            pass  # also on damage that FFmpeg itself gets over: PyAV goes on where decord stopped
    yield from (contents.upright(frame) for frame in with_pyav(source, contents, indices[done:]))


def _suits_decord(contents: Contents) -> bool:
    sound = not (contents.complaint or contents.edited or contents.stretched)
    upright = contents.orientation == Orientation()
    known = contents.container.startswith(_DECORD_CONTAINERS) and contents.pixels in _DECORD_PIXELS
    return sound and upright and known


def _with_decord(source: Path | bytes, contents: Contents, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    handle = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    # Without the limit, frames that cannot be decoded would be replaced by their neighbours.
    reader = decord.VideoReader(handle, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
    if len(reader) != contents.frames:
        return
    wanted = set(indices)
    # Every frame in turn: at a seek, and `skip_frames` seeks, decord may give another frame than the one asked for
    # (open groups of pictures in HEVC, fragmented mp4).
    for index in range(indices[-1] + 1):
        picture = reader.next().asnumpy()
        if picture.shape != (contents.height, contents.width, 3):
            return  # it takes the padding of narrow rows (16, 32, 48, 96 or 144 pixels) for more channels
        if index in wanted:
            yield picture


def with_pyav(
    source: Path | bytes, contents: Contents, indices: list[int], entry: int | None = None
) -> Iterator[av.VideoFrame]:
    """Frames by ascending index, decoded from the key frame before the first of them.

    Args:
        source: a file, or a file's bytes.
        contents: of the clip.
        indices: of the frames, ascending, each once.
        entry: index of the key frame at which decoding starts; None takes the last possible one.

    Raises:
        ValueError: if the clip cannot be decoded that far.
    """
    done = 0
    entry = contents.entry(indices[0]) if entry is None and indices else entry
    if entry:
        with opened(source) as container:
            container.seek(int(contents.ticks[entry]), stream=video_stream(container))
            for frame in decoded(container):
                wanted = contents.ticks[indices[done]]
                if frame.pts is None or frame.pts > wanted:  # the seek went too far, or a frame is missing
                    break
                if frame.pts == wanted:
                    yield frame
                    done += 1
                if done == len(indices):
                    return
    with opened(source) as container:
        for index, frame in enumerate(decoded(container)):
            if done == len(indices):
                return
            if index == indices[done]:
                yield frame
                done += 1
    if done < len(indices):
        raise ValueError(
            f"{name_of(source)} cannot be decoded (frame {indices[done]} of {contents.frames} is missing); "
            "use a whole video."
        )
