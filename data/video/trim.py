"""Cutting a clip without encoding it again."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data.video.container import Contents, demuxed, name_of, opened, scan, video_stream
from data.video.frames import with_pyav

#: What an mp4 may hold and every reader takes from it; the rest goes into Matroska.
_MP4_CODECS = ("h264", "hevc", "av1", "vp9", "mpeg4")
_MATROSKA_MAGIC = b"\x1a\x45\xdf\xa3"


def trim_video(source: Path | bytes, first: int, last: int) -> tuple[bytes, int]:
    """A clip that holds the frames `first` to `last`, of the same packets, and the new index of frame `first`.

    It begins at the key frame at or before `first` and ends with what `last` needs; only the picture is kept, no sound.
    The first and the last frame are decoded from both clips and compared. The same clip gives the same bytes.

    Args:
        source: a file, or a file's bytes.
        first: index of the first frame that is wanted.
        last: index of the last, at least `first`.

    Returns:
        The new file, mp4 or Matroska (`clip_suffix` tells which); index of old frame `first` in it: old frame i is new
        frame i - first + index.

    Raises:
        ValueError: if the clip cannot be cut there without loss, or has no such frames.
    """
    contents = scan(source)
    if not 0 <= first <= last < contents.frames:
        raise ValueError(f"got frames {first} to {last}; {name_of(source)} has frames 0 to {contents.frames - 1}.")
    if not contents.timed or contents.edited:
        raise ValueError(f"{name_of(source)} cannot be trimmed: its container does not time every packet.")
    content = _copy(source, contents, first, last)
    try:
        index = _verify(source, contents, content, first, last)
    except ValueError as error:
        raise ValueError(f"{name_of(source)} cannot be trimmed to frames {first} to {last}: {error}") from error
    return content, index


def clip_suffix(content: bytes) -> str:
    """Ending of the name of a file that `trim_video` made: "mp4" or "mkv"."""
    return "mkv" if content.startswith(_MATROSKA_MAGIC) else "mp4"


def _copy(source: Path | bytes, contents: Contents, first: int, last: int) -> bytes:
    begin = int(contents.ticks[contents.entry(first)])
    wanted = {int(tick) for tick in contents.ticks[first : last + 1]}
    output = io.BytesIO()
    with opened(source) as container:
        stream = video_stream(container)
        form = "mp4" if contents.codec in _MP4_CODECS else "matroska"
        with av.open(output, "w", format=form, options={"fflags": "+bitexact"}) as copy:
            track = copy.add_stream_from_template(stream, opaque=True)  # whichever decoder reads it
            started = False
            for packet in demuxed(container):
                if not wanted or packet.is_corrupt or packet.pts is None:
                    break
                started = started or packet.pts == begin
                # In an open group of pictures, frames shown before its key frame follow it, and need what is left out.
                if not started or packet.pts < begin:
                    continue
                wanted.discard(packet.pts)
                packet.pts -= begin
                packet.dts = None if packet.dts is None else packet.dts - begin
                packet.stream = track
                copy.mux(packet)
    return output.getvalue()


def _verify(source: Path | bytes, contents: Contents, content: bytes, first: int, last: int) -> int:
    """The new index of frame `first`.

    Raises:
        ValueError: if a frame is missing, comes at another time or differs.
    """
    copied = scan(content)
    begin = contents.entry(first)
    # Times in the old ticks: the new container may count finer or, Matroska, in milliseconds.
    since = contents.times[first : last + 1] - contents.times[begin]
    index = int(np.searchsorted(copied.times, since[0] - _tolerance(contents, copied)))
    found = copied.times[index : index + len(since)]
    if len(found) < len(since) or np.abs(found - since).max() > _tolerance(contents, copied):
        raise ValueError("the copied frames come at other times.")
    ends = sorted({first, last})
    # Decoded from an earlier key frame than the copy's, so that what the copy lacks is seen.
    before = contents.entry(begin - 1) if begin else 0
    old = with_pyav(source, contents, ends, entry=before)
    new = with_pyav(content, copied, [index + end - first for end in ends], entry=0)
    for end, theirs, ours in zip(ends, old, new, strict=True):
        if not np.array_equal(contents.upright(theirs), copied.upright(ours)):
            raise ValueError(f"frame {end} differs in the copy.")
    return index


def _tolerance(*clips: Contents) -> float:
    return float(max((clip.time_base for clip in clips), default=Fraction(0)))
