"""Frames of a clip by index: decord reads them where its frames equal FFmpeg's, PyAV elsewhere.

Legend: H W pixels.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import decord
import numpy as np
from numpy.typing import NDArray

from data.video.container import clip_name, decode_frames, open_clip, video_stream
from data.video.stream_info import Orientation, StreamInfo

#: Where decord's frames equal FFmpeg's pixel by pixel. Decord converts 10 bits to 8 in another way, and it returns the
#: frames of transport streams in a wrong order.
_DECORD_CONTAINERS = ("mov,mp4", "matroska", "avi")
_DECORD_PIXEL_FORMATS = ("yuv420p", "yuvj420p", "yuv422p", "yuvj422p", "yuv444p", "yuvj444p")

decord.logging.set_level(decord.logging.QUIET)  # the exceptions say what matters


def read_frames(source: Path | bytes, info: StreamInfo, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    """Frames as they are displayed, (H, W, 3) RGB each.

    Args:
        source: a file, or a file's bytes.
        info: of the clip.
        indices: of the frames, ascending, without repetition; frame 0 is the first that is shown.

    Raises:
        ValueError: if the clip cannot be decoded up to the last index.
    """
    done = 0
    # For frames that lie far apart, or start behind a key frame, PyAV decodes fewer frames.
    if _suits_decord(info) and 2 * len(indices) > indices[-1]:
        try:
            for picture in _read_with_decord(source, info, indices):
                yield picture
                done += 1
        except (decord.DECORDError, RuntimeError, OSError, StopIteration):
            pass  # decord also stops at damage that FFmpeg tolerates: PyAV continues there
    yield from (info.to_rgb(frame) for frame in read_with_pyav(source, info, indices[done:]))


def _suits_decord(info: StreamInfo) -> bool:
    regular = not (info.truncation or info.has_edit_list or info.anamorphic)
    upright = info.orientation == Orientation()
    known = info.container.startswith(_DECORD_CONTAINERS) and info.pixel_format in _DECORD_PIXEL_FORMATS
    return regular and upright and known


def _read_with_decord(source: Path | bytes, info: StreamInfo, indices: list[int]) -> Iterator[NDArray[np.uint8]]:
    handle = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    # Without the limit, decord would replace frames that it cannot decode by their neighbours.
    reader = decord.VideoReader(handle, ctx=decord.cpu(0), num_threads=1, fault_tol=1e-9)
    if len(reader) != info.frames:
        return
    wanted = set(indices)
    # Every frame in turn: after a seek, and `skip_frames` seeks, decord may return another frame than the requested one
    # (open groups of pictures in HEVC, fragmented mp4).
    for index in range(indices[-1] + 1):
        picture = reader.next().asnumpy()
        if picture.shape != (info.height, info.width, 3):
            return  # decord takes the padding of narrow rows (16, 32, 48, 96 or 144 pixels) for more channels
        if index in wanted:
            yield picture


def read_with_pyav(
    source: Path | bytes, info: StreamInfo, indices: list[int], start: int | None = None
) -> Iterator[av.VideoFrame]:
    """Frames by ascending index, decoded from the key frame before the first of them.

    Args:
        source: a file, or a file's bytes.
        info: of the clip.
        indices: of the frames, ascending, without repetition.
        start: index of the key frame at which decoding starts; None takes the last possible one.

    Raises:
        ValueError: if the clip cannot be decoded up to the last index.
    """
    done = 0
    start = info.key_frame_before(indices[0]) if start is None and indices else start
    if start:
        with open_clip(source) as container:
            container.seek(int(info.ticks[start]), stream=video_stream(container))
            for frame in decode_frames(container):
                wanted = info.ticks[indices[done]]
                if frame.pts is None or frame.pts > wanted:  # the seek went too far, or a frame is missing
                    break
                if frame.pts == wanted:
                    yield frame
                    done += 1
                if done == len(indices):
                    return
    with open_clip(source) as container:
        for index, frame in enumerate(decode_frames(container)):
            if done == len(indices):
                return
            if index == indices[done]:
                yield frame
                done += 1
    if done < len(indices):
        raise ValueError(
            f"{clip_name(source)} cannot be decoded (frame {indices[done]} of {info.frames} is missing); "
            "use a whole video."
        )
