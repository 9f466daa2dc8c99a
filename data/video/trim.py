"""Cutting a clip without encoding it again."""

import io
from pathlib import Path

import av
import numpy as np

from data.video.container import clip_name, demux, open_clip, video_stream
from data.video.frame_readers import read_with_pyav
from data.video.stream_info import StreamInfo, read_stream_info

#: Codecs that every reader accepts in an mp4; clips of other codecs are written as Matroska.
_MP4_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
_MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"


def trim_video(source: Path | bytes, first: int, last: int) -> tuple[bytes, int]:
    """Copies the packets of frames `first` to `last` into a new clip.

    The new clip begins at the key frame at or before `first` and ends with the packets that `last` needs. It has no
    sound. The first and the last frame are decoded from both clips and compared. Equal clips give equal bytes.

    Args:
        source: a file, or a file's bytes.
        first: index of the first frame that is wanted.
        last: index of the last, at least `first`.

    Returns:
        The new file, mp4 or Matroska (see `clip_suffix`), and the index of old frame `first` in it: old frame i is new
        frame i - first + index.

    Raises:
        ValueError: if the clip cannot be cut there without loss, or has no such frames.
    """
    info = read_stream_info(source)
    if not 0 <= first <= last < info.frames:
        raise ValueError(f"got frames {first} to {last}; {clip_name(source)} has frames 0 to {info.frames - 1}.")
    if not info.has_times or info.has_edit_list:
        raise ValueError(f"{clip_name(source)} cannot be trimmed: its container does not time every packet.")
    content = _copy_packets(source, info, first, last)
    try:
        index = _verify(source, info, content, first, last)
    except ValueError as error:
        raise ValueError(f"{clip_name(source)} cannot be trimmed to frames {first} to {last}: {error}") from error
    return content, index


def clip_suffix(content: bytes) -> str:
    """File name suffix for a clip of `trim_video`: "mp4" or "mkv"."""
    return "mkv" if content.startswith(_MATROSKA_MAGIC) else "mp4"


def _copy_packets(source: Path | bytes, info: StreamInfo, first: int, last: int) -> bytes:
    begin = int(info.ticks[info.key_frame_before(first)])
    wanted = {int(tick) for tick in info.ticks[first : last + 1]}
    output = io.BytesIO()
    with open_clip(source) as container:
        stream = video_stream(container)
        format_name = "mp4" if info.codec in _MP4_CODECS else "matroska"
        with av.open(output, "w", format=format_name, options={"fflags": "+bitexact"}) as copy:
            track = copy.add_stream_from_template(stream, opaque=True)  # whichever decoder reads it
            started = False
            for packet in demux(container):
                if not wanted or packet.is_corrupt or packet.pts is None:
                    break
                started = started or packet.pts == begin
                # In an open group of pictures, frames that are shown before its key frame follow it in the file. They
                # need packets that are not copied.
                if not started or packet.pts < begin:
                    continue
                wanted.discard(packet.pts)
                packet.pts -= begin
                packet.dts = None if packet.dts is None else packet.dts - begin
                packet.stream = track
                copy.mux(packet)
    return output.getvalue()


def _verify(source: Path | bytes, info: StreamInfo, content: bytes, first: int, last: int) -> int:
    """The index of frame `first` in the copy.

    Raises:
        ValueError: if a frame is missing, has another time or differs.
    """
    copied = read_stream_info(content)
    begin = info.key_frame_before(first)
    # Seconds, because the new container may count in finer ticks or, Matroska, in milliseconds.
    since = info.times[first : last + 1] - info.times[begin]
    tolerance = float(max(info.time_base, copied.time_base))
    index = int(np.searchsorted(copied.times, since[0] - tolerance))
    found = copied.times[index : index + len(since)]
    if len(found) < len(since) or np.abs(found - since).max() > tolerance:
        raise ValueError("the copied frames come at other times.")
    ends = sorted({first, last})
    # The original is decoded from an earlier key frame than the copy's: this shows whether the copy lacks a packet.
    before = info.key_frame_before(begin - 1) if begin else 0
    old = read_with_pyav(source, info, ends, start=before)
    new = read_with_pyav(content, copied, [index + end - first for end in ends], start=0)
    for end, theirs, ours in zip(ends, old, new, strict=True):
        if not np.array_equal(info.to_rgb(theirs), copied.to_rgb(ours)):
            raise ValueError(f"frame {end} differs in the copy.")
    return index
