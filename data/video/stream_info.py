"""What the packets of a clip say about it: frame times, key frames, orientation. Only the first frame is decoded.

Legend: T frames, H W pixels.
"""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from numpy.typing import NDArray

from data.video.container import clip_name, demux, open_clip, video_stream


@dataclass(frozen=True)
class Orientation:
    """How to turn a stored picture upright: swap its axes first, then mirror it."""

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
        """Degrees clockwise to upright; for a mirrored picture, what remains after mirroring it left to right."""
        if self.swap:
            return 270 if self.flip_rows else 90
        return 180 if self.flip_rows else 0

    def apply(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(H, W, 3), or (W, H, 3) if the axes are swapped."""
        picture = picture.swapaxes(0, 1) if self.swap else picture
        picture = picture[::-1] if self.flip_rows else picture
        return np.ascontiguousarray(picture[:, ::-1] if self.flip_columns else picture)


@dataclass(frozen=True)
class StreamInfo:
    """The video stream of a clip, as its packets describe it.

    Args:
        container: FFmpeg's name of the format.
        codec: FFmpeg's name, such as "h264".
        pixel_format: FFmpeg's name, such as "yuv420p".
        height: of the stored pictures, in pixels.
        width: of the stored pictures after their pixels are made square.
        anamorphic: whether the stored pixels are not square.
        orientation: how to turn the stored pictures upright.
        time_base: seconds per tick.
        ticks: (T,) presentation times in presentation order, of complete packets that are shown.
        key_frames: indices in `ticks`, ascending.
        rate: frames per second according to the container.
        last_duration: ticks for which the last frame is shown, 0 if unknown.
        has_times: whether every packet has a presentation time of its own; otherwise `ticks` counts the packets.
        has_edit_list: whether the container hides packets.
        indexed_packets: packets that the container's index lists if fewer can be read; 0 otherwise.
        corrupt: whether reading ended at an incomplete packet.
    """

    container: str
    codec: str
    pixel_format: str
    height: int
    width: int
    anamorphic: bool
    orientation: Orientation
    time_base: Fraction
    ticks: NDArray[np.int64]
    key_frames: tuple[int, ...]
    rate: Fraction
    last_duration: int
    has_times: bool
    has_edit_list: bool
    indexed_packets: int
    corrupt: bool

    @property
    def frames(self) -> int:
        """Number of frames that can be read."""
        return len(self.ticks)

    @property
    def times(self) -> NDArray[np.float64]:
        """(T,) seconds from the first frame."""
        return (self.ticks - self.ticks[0]) * float(self.time_base)

    @property
    def fps(self) -> float:
        """Frames per second: the container's if it agrees with the times to within a tick, else their mean."""
        span = (int(self.ticks[-1]) - int(self.ticks[0])) * self.time_base
        if abs(span - (self.frames - 1) / self.rate) <= self.time_base:
            return float(self.rate)
        return float((self.frames - 1) / span) if span else float(self.rate)

    @property
    def duration(self) -> float:
        """Seconds from the start of the first frame to the end of the last."""
        return float(self.times[-1]) + (float(self.last_duration * self.time_base) or 1 / self.fps)

    @property
    def variable(self) -> bool:
        """Whether an interval between frames differs from the median by over a tenth, and by more than rounding."""
        steps = np.diff(self.ticks)
        off = np.abs(steps - np.median(steps)).max(initial=0) if len(steps) else 0
        return bool(off > 1 and off > 0.1 * np.median(steps))

    @property
    def displayed(self) -> tuple[int, int]:
        """(height, width) of the upright picture."""
        return (self.width, self.height) if self.orientation.swap else (self.height, self.width)

    def key_frame_before(self, index: int) -> int:
        """The last key frame at or before frame `index`; 0 if the packets do not say."""
        if not self.has_times or self.has_edit_list:
            return 0
        return max((key for key in self.key_frames if key <= index), default=0)

    def to_rgb(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        """A frame as it is displayed, (H, W, 3) RGB."""
        if self.anamorphic:
            frame = frame.reformat(self.width, self.height, "rgb24")
        return self.orientation.apply(np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8))

    @property
    def truncation(self) -> str:
        """Message on what is missing at the end; empty if the container holds all that it lists."""
        if self.indexed_packets:
            return f"is cut short: its container promises {self.indexed_packets} frames, {self.frames} can be read"
        return f"is cut short: {self.frames} frames can be read, the next is not whole" if self.corrupt else ""


def read_stream_info(source: Path | bytes) -> StreamInfo:
    """Reads all packets of a clip's video stream, which is cheap, and decodes its first frame.

    Args:
        source: a file, or a file's bytes.

    Raises:
        ValueError: if the clip cannot be opened or its first frame cannot be decoded.
    """
    with open_clip(source) as container:
        stream = video_stream(container)
        shown: list[tuple[Any, bool]] = []  # presentation time, or None; whether it is a key frame
        packets, latest, last_duration, first = 0, -(2**63), 0, None
        for packet in demux(container):
            if first is None:
                first = next(iter(stream.decode(None if packet.is_corrupt else packet)), None)
            if packet.is_corrupt or not packet.size:
                continue
            packets += 1
            if not packet.is_discard:  # hidden by an edit list
                shown.append((packet.pts, packet.is_keyframe))
            if packet.pts is not None and packet.pts > latest:
                latest, last_duration = packet.pts, packet.duration or 0
        if first is None:
            raise ValueError(f"{clip_name(source)} holds no frame that is whole; use a whole video.")
        rate = stream.average_rate or stream.guessed_rate or Fraction(1)
        has_times = None not in {pts for pts, _ in shown} and len(dict(shown)) == len(shown)
        if has_times:
            # A stream that starts between key frames is shown from its first key frame on.
            ordered = sorted((pts, key) for pts, key in shown if first.pts is None or pts >= first.pts)
        else:
            ordered = [(index, key) for index, (_, key) in enumerate(shown)]
        assert stream.time_base is not None  # a demuxed stream has one
        indexed = len(stream.index_entries)
        return StreamInfo(
            container=container.format.name,
            codec=stream.codec.canonical_name,
            pixel_format=first.format.name,
            height=first.height,
            width=round(first.width * (stream.sample_aspect_ratio or 1)),
            anamorphic=(stream.sample_aspect_ratio or 1) != 1,
            orientation=Orientation.of(first),
            time_base=Fraction(stream.time_base) if has_times else 1 / rate,
            ticks=np.array([tick for tick, _ in ordered], dtype=np.int64),
            key_frames=tuple(index for index, (_, key) in enumerate(ordered) if key),
            rate=rate,
            last_duration=last_duration if has_times else 0,
            has_times=has_times,
            has_edit_list=len(shown) < packets,
            indexed_packets=indexed if indexed > packets else 0,
            corrupt=packet.is_corrupt,
        )
