"""What lies in a clip's container: packets, times, key frames, orientation. No frame but the first is decoded for it.

Legend: T frames, H W pixels.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.container import InputContainer
from numpy.typing import NDArray

#: Containers that are opened. A clip is anybody's file: the others include play lists, which name further files and
#: addresses that would be opened too, whatever the file is called.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,ivf,nut"


@dataclass(frozen=True)
class Orientation:
    """How a stored picture becomes upright: swap its axes, then mirror."""

    swap: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, frame: av.VideoFrame) -> "Orientation":
        """From the display matrix, rounded to quarter turns."""
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return cls()
        # x' = a x + c y, y' = b x + d y: ISO/IEC 14496-12, 8.3.2.
        a, b, _, c, d = np.frombuffer(cast(Any, matrix), dtype=np.int32)[:5].tolist()
        if abs(a) >= abs(b):
            return cls(False, d < 0, a < 0)
        return cls(True, b < 0, c < 0)

    @property
    def rotation(self) -> int:
        """Degrees clockwise to upright; of a mirrored picture what remains when it is mirrored left to right."""
        if self.swap:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_rows else 0

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3) or, if the axes are swapped, (W, H, 3)."""
        picture = picture.swapaxes(0, 1) if self.swap else picture
        picture = picture[::-1] if self.flip_rows else picture
        return np.ascontiguousarray(picture[:, ::-1] if self.flip_columns else picture)


@dataclass(frozen=True)
class Contents:
    """The video stream of a clip as its packets tell it.

    Args:
        container: FFmpeg's name of it.
        codec: as FFmpeg names it, such as "h264".
        pixels: FFmpeg's name of the pixel format, such as "yuv420p".
        height: of the stored pictures, in pixels.
        width: of the stored pictures when their pixels are made square.
        stretched: whether they are not square as they are stored.
        orientation: how the stored pictures become upright.
        time_base: seconds per tick.
        ticks: (T,) presentation times in order of presentation, those of packets that are shown and whole.
        keys: positions in `ticks` of the key frames, ascending.
        rate: frames per second by the container.
        last: ticks that the last frame is shown for, 0 if unknown.
        timed: whether every packet has a presentation time of its own; otherwise `ticks` are counted, not read.
        edited: whether the container hides packets.
        promised: packets that the container's index lists, if these are more than can be read; 0 otherwise.
        damaged: whether reading ended at a packet that is not whole.
    """

    container: str
    codec: str
    pixels: str
    height: int
    width: int
    stretched: bool
    orientation: Orientation
    time_base: Fraction
    ticks: NDArray[np.int64]
    keys: tuple[int, ...]
    rate: Fraction
    last: int
    timed: bool
    edited: bool
    promised: int
    damaged: bool

    @property
    def frames(self) -> int:
        """How many frames can be read."""
        return len(self.ticks)

    @property
    def times(self) -> NDArray[np.float64]:
        """(T,) seconds from the first frame."""
        return (self.ticks - self.ticks[0]) * float(self.time_base)

    @property
    def fps(self) -> float:
        """Frames per second: the container's where it agrees with the times to a tick, the mean otherwise."""
        span = (int(self.ticks[-1]) - int(self.ticks[0])) * self.time_base
        if abs(span - (self.frames - 1) / self.rate) <= self.time_base:
            return float(self.rate)
        return float((self.frames - 1) / span) if span else float(self.rate)

    @property
    def duration(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return float(self.times[-1]) + (float(self.last * self.time_base) or 1 / self.fps)

    @property
    def variable(self) -> bool:
        """Whether an interval between frames differs from the usual one by a tenth, and by more than rounding."""
        steps = np.diff(self.ticks)
        off = np.abs(steps - np.median(steps)).max(initial=0) if len(steps) else 0
        return bool(off > 1 and off > 0.1 * np.median(steps))

    @property
    def displayed(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        return (self.width, self.height) if self.orientation.swap else (self.height, self.width)

    def entry(self, index: int) -> int:
        """The last key frame at or before frame `index`; 0 where the container's times do not tell."""
        if not self.timed or self.edited:
            return 0
        return max((key for key in self.keys if key <= index), default=0)

    def upright(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """A frame as it is displayed, (H, W, 3) RGB."""
        if self.stretched:
            frame = frame.reformat(self.width, self.height, "rgb24")
        return self.orientation.apply(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))

    @property
    def complaint(self) -> str:
        """What is missing, in words; empty if the container holds what it promises."""
        if self.promised:
            return f"is cut short: its container promises {self.promised} frames, {self.frames} can be read"
        return f"is cut short: {self.frames} frames can be read, the next is not whole" if self.damaged else ""


def name_of(source: Path | bytes) -> str:
    """How a message calls a clip."""
    return f"clip of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def _short(error: BaseException) -> str:
    """What FFmpeg says, without the file's name."""
    return str(getattr(error, "strerror", None) or "FFmpeg failed").lower()


@contextmanager
def opened(source: Path | bytes) -> Iterator[InputContainer]:
    """A clip, open; FFmpeg's errors inside become ValueErrors in words.

    Raises:
        ValueError: if it is empty, no video, or FFmpeg fails inside.
    """
    _check_not_empty(source)
    known = False
    try:
        handle = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(handle, mode="r", options={"format_whitelist": _CONTAINERS}) as container:
            known = True
            _check_video(container, source)
            video_stream(container).codec_context.thread_count = 1
            yield container
    except (av.FFmpegError, OSError) as error:
        strange = not known and isinstance(error, av.error.InvalidDataError | av.error.ArgumentError)
        why = _no_video(source) if strange else _short(error)
        raise ValueError(f"{name_of(source)} cannot be decoded ({why}); use a whole video.") from error


def video_stream(container: InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture."""
    return next(s for s in container.streams.video if not s.disposition & s.disposition.attached_pic)


def _check_not_empty(source: Path | bytes) -> None:
    if isinstance(source, bytes):
        empty = not source
    else:
        empty = source.is_file() and not source.stat().st_size
    if empty:
        raise ValueError(f"{name_of(source)} is empty (0 bytes); use a whole video.")


def _check_video(container: InputContainer, source: Path | bytes) -> None:
    if all(s.disposition & s.disposition.attached_pic for s in container.streams.video):
        kinds = sorted({"cover" if stream.type == "video" else stream.type for stream in container.streams})
        if not kinds:
            raise ValueError(f"{name_of(source)} cannot be decoded ({_no_video(source)}); use a whole video.")
        only = f"({' and '.join(kinds)} only)"
        raise ValueError(f"{name_of(source)} holds no video stream {only}; use a clip with a picture.")
    if video_stream(container).codec_context is None:
        raise ValueError(f"{name_of(source)} has a codec that is not known here; convert it to H.264.")


def _no_video(source: Path | bytes) -> str:
    """Why nothing was found. The index of an mp4 usually comes last, and is missing where the file is cut short."""
    if isinstance(source, Path) and not source.is_file():
        return "it is no file"
    names: list[bytes] = []
    end = 0  # of the boxes, by their own word
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while len(header := file.read(16)) >= 8 and len(names) < 64:
            size = int.from_bytes(header[8:] if header[:4] == b"\0\0\0\1" else header[:4], "big")
            names.append(header[4:8])
            end += size
            if size < 8:
                break
            file.seek(end)
        whole = end <= file.seek(0, io.SEEK_END)
    cut = names[:1] == [b"ftyp"] and (b"moov" not in names or not whole)
    return "it is cut short: the index of this mp4 is missing" if cut else "it is no video"


def demuxed(container: InputContainer) -> Iterator[av.Packet]:
    """Packets of the video stream in the order in which they are decoded; one that is marked corrupt is the last."""
    try:
        for packet in container.demux(video_stream(container)):
            yield packet
            if packet.is_corrupt:
                return
    except av.error.InvalidDataError:  # the demuxer's: what the consumer raises does not pass through here
        end = av.Packet()
        end.is_corrupt = True
        yield end


def decoded(container: InputContainer) -> Iterator[av.VideoFrame]:
    """Frames in order of presentation, up to the first packet that is not whole."""
    for packet in demuxed(container):
        if packet.is_corrupt:
            yield from video_stream(container).decode(None)
        else:
            yield from packet.decode()  # the last one is empty and flushes the decoder


def scan(source: Path | bytes) -> Contents:
    """Reads all packets of a clip's video stream, which is cheap, and decodes its first frame.

    Raises:
        ValueError: if it cannot be opened or its first frame not decoded.
    """
    with opened(source) as container:
        stream = video_stream(container)
        shown: list[tuple[Any, bool]] = []  # presentation time, if it has one; whether it is a key frame
        read, latest, last, first = 0, -(2**63), 0, None
        for packet in demuxed(container):
            if first is None:
                first = next(iter(stream.decode(None if packet.is_corrupt else packet)), None)
            if packet.is_corrupt or not packet.size:
                continue
            read += 1
            if not packet.is_discard:  # hidden by an edit list
                shown.append((packet.pts, packet.is_keyframe))
            if packet.pts is not None and packet.pts > latest:
                latest, last = packet.pts, packet.duration or 0
        if first is None:
            raise ValueError(f"{name_of(source)} holds no frame that is whole; use a whole video.")
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        timed = None not in {pts for pts, _ in shown} and len(dict(shown)) == len(shown)
        if timed:
            # A stream that starts between key frames is shown from the first of them.
            ordered = sorted((pts, key) for pts, key in shown if first.pts is None or pts >= first.pts)
        else:
            ordered = [(index, key) for index, (_, key) in enumerate(shown)]
        assert stream.time_base is not None  # it was demuxed
        listed = len(stream.index_entries)
        return Contents(
            container=container.format.name,
            codec=stream.codec.canonical_name,
            pixels=first.format.name,
            height=first.height,
            width=round(first.width * (stream.sample_aspect_ratio or 1)),
            stretched=(stream.sample_aspect_ratio or 1) != 1,
            orientation=Orientation.of(first),
            time_base=Fraction(stream.time_base) if timed else 1 / rate,
            ticks=np.array([tick for tick, _ in ordered], dtype=np.int64),
            keys=tuple(index for index, (_, key) in enumerate(ordered) if key),
            rate=rate,
            last=last if timed else 0,
            timed=timed,
            edited=len(shown) < read,
            promised=listed if listed > read else 0,
            damaged=packet.is_corrupt,
        )
