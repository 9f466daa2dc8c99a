"""Clips of many kinds: every usual codec and container, unusual ones, and damaged ones.

`BROKEN` and `SOUND` map the name of a kind to a maker; `make(name, folder)` writes the file and returns its path. A
sound clip shows `scene(...)`, whose frames all differ, so that a test notices a frame that is off by one.

Legend: T frames, H W pixels.
"""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from data.video.write import deterministic_x264

#: Number of frames, unless the kind says otherwise.
FRAMES = 20
HEIGHT, WIDTH, FPS = 48, 64, 10


@dataclass(frozen=True)
class Sound:
    """A clip that can be read, and its facts.

    Args:
        make: writes it to a path.
        suffix: of the file.
        codec: as PyAV names it.
        frames: number of frames that can be decoded.
        height: as displayed, in pixels.
        width: as displayed, in pixels.
        rotation: degrees clockwise by which a player turns the pictures.
        variable: whether the time between its frames varies.
    """

    make: Callable[[Path], None]
    suffix: str = ".mp4"
    codec: str = "h264"
    frames: int = FRAMES
    height: int = HEIGHT
    width: int = WIDTH
    rotation: int = 0
    variable: bool = False


@dataclass(frozen=True)
class Broken:
    """A clip that cannot be used, and the expected error.

    Args:
        make: writes it to a path.
        reason: regular expression that the message has to match.
        suffix: of the file.
    """

    make: Callable[[Path], None]
    reason: str
    suffix: str = ".mp4"


def scene(frames: int = FRAMES, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """(T, H, W, 3): a bright bar that moves right over a background that gets lighter, with a red top left corner."""
    video = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for t in range(frames):
        video[t] = (20, 40 + (100 * t) // max(frames - 1, 1), 110)
        left = t * max(width - 8, 1) // frames
        video[t, :, left : left + 8] = (230, 210, 60)
    video[:, : height // 3, : width // 4] = (220, 20, 20)
    return video


def _deterministic(codec: str, options: dict[str, str]) -> dict[str, str]:
    """Options with which a codec gives the same bytes in every run."""
    if codec != "libx264" or not (exact := deterministic_x264()):
        return options
    return {**options, "x264-params": ":".join([*exact.values(), *filter(None, [options.get("x264-params")])])}


def write_clip(
    path: Path,
    video: NDArray[np.uint8],
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
) -> None:
    """Writes (T, H, W, 3) with any codec; `times` are presentation times in hundredths of a second."""
    options = {"threads": "1", **_deterministic(codec, options or {})}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pixels
        stream.codec_context.time_base = Fraction(1, 100)
        for index, image in enumerate(video):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = 10 * index if times is None else times[index]
            frame.time_base = Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def boxes(content: bytes, path: str, start: int = 0, end: int | None = None) -> Iterator[tuple[int, int]]:
    """(offset, size) of each mp4 box along a path such as "moov/trak/tkhd", header included."""
    name, _, rest = path.partition("/")
    end = len(content) if end is None else end
    while start + 8 <= end:
        size = struct.unpack(">I", content[start : start + 4])[0]
        if size < 8:
            return
        if content[start + 4 : start + 8] == name.encode():
            if rest:
                yield from boxes(content, rest, start + 8, start + size)
            else:
                yield start, size
        start += size


def _patch(
    path: Path, name: str, version_0: int, version_1: int, change: Callable[[bytearray, int, int], None]
) -> None:
    """Calls change(content, offset, version) for each mp4 box of a name; the offset depends on the box's version."""
    content = bytearray(path.read_bytes())
    for start, _ in list(boxes(bytes(content), name)):
        version = content[start + 8]
        change(content, start + 8 + (version_1 if version else version_0), version)
    path.write_bytes(content)


def _moving(codec: str = "libx264", pixels: str = "yuv420p", height: int = HEIGHT, width: int = WIDTH,
            frames: int = FRAMES, times: list[int] | None = None,
            **options: str) -> Callable[[Path], None]:  # fmt: skip
    options = {name.replace("_", "-"): value for name, value in options.items()}
    return lambda path: write_clip(path, scene(frames, height, width), codec, pixels, options, times)


_X265 = {"x265_params": "log-level=none:pools=none:frame-threads=1:keyint=8"}


def _with_display_matrix(a: int, b: int, c: int, d: int) -> Callable[[Path], None]:
    """An H.264 clip with a display matrix: x' = a x + c y, y' = b x + d y."""

    def make(path: Path) -> None:
        write_clip(path, scene())
        matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

        def change(content: bytearray, at: int, _: int) -> None:
            content[at : at + 36] = matrix

        _patch(path, "moov/trak/tkhd", 40, 52, change)

    return make


def _wrong_header_duration(path: Path) -> None:
    """Every duration in the header is a hundred times too long; the list of frames is correct."""
    write_clip(path, scene())

    def change(content: bytearray, at: int, version: int) -> None:
        form = ">Q" if version else ">I"
        struct.pack_into(form, content, at, 100 * struct.unpack_from(form, content, at)[0])

    _patch(path, "moov/mvhd", 16, 24, change)
    _patch(path, "moov/trak/tkhd", 20, 28, change)
    _patch(path, "moov/trak/mdia/mdhd", 16, 24, change)


#: Frames that the edit list of the kind "edit-list" hides.
HIDDEN = 5


def _edited(path: Path) -> None:
    """An edit list hides the first frames, as in clips that were trimmed on a phone."""
    write_clip(path, scene(), options={"bf": "3", "g": "8"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        skip = int(HIDDEN / FPS / stream.time_base)

    def change(content: bytearray, at: int, _: int) -> None:
        struct.pack_into(">I", content, at, struct.unpack_from(">I", content, at)[0] + skip)

    _patch(path, "moov/trak/edts/elst", 12, 16, change)


def _anamorphic(path: Path) -> None:
    """64 stored columns that are displayed as 128."""
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=FPS, options=_deterministic("libx264", {"threads": "1"}))
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        for image in scene():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _fragmented(path: Path, movflags: str = "frag_keyframe+empty_moov") -> None:
    with av.open(str(path), "w", options={"fflags": "+bitexact", "movflags": movflags}) as container:
        stream = container.add_stream(
            "libx264", rate=FPS, options=_deterministic("libx264", {"threads": "1", "bf": "3", "g": "8"})
        )
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for image in scene():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


_TIMES = [0, 10, 20, 25, 30, 60, 61, 62, 90, 100, 130, 140, 150, 155, 160, 170, 171, 190, 220, 300]

SOUND: dict[str, Sound] = {
    "h264": Sound(_moving(bf="0")),
    "h264-b-frames": Sound(_moving(bf="3", g="8")),
    "h264-open-gop": Sound(_moving(bf="3", x264_params="open-gop=1:keyint=8:min-keyint=8:scenecut=0")),
    "h264-10-bit": Sound(_moving(pixels="yuv420p10le")),
    "hevc": Sound(_moving("libx265", **_X265), codec="hevc"),
    "hevc-10-bit": Sound(_moving("libx265", "yuv420p10le", **_X265), codec="hevc"),
    "vp9": Sound(_moving("libvpx-vp9"), ".webm", codec="vp9"),
    "av1": Sound(_moving("libsvtav1", preset="12"), codec="av1"),
    "av1-10-bit": Sound(_moving("libsvtav1", "yuv420p10le", preset="12"), codec="av1"),
    "fragmented": Sound(_fragmented),
    "transport-stream": Sound(_moving(bf="3", g="8"), ".ts"),
    "matroska": Sound(_moving(bf="3", g="8"), ".mkv"),
    "variable-rate": Sound(_moving(bf="3", g="8", times=_TIMES), variable=True),
    "one-frame": Sound(_moving(frames=1), frames=1),
    "odd-size": Sound(_moving(pixels="yuv444p", height=65, width=47), height=65, width=47),
    **{f"narrow-{w}": Sound(_moving(height=64, width=w), height=64, width=w) for w in (16, 32, 48, 96, 144)},
    "rotated-90": Sound(_with_display_matrix(0, 1, -1, 0), height=WIDTH, width=HEIGHT, rotation=90),
    "rotated-180": Sound(_with_display_matrix(-1, 0, 0, -1), rotation=180),
    "rotated-270": Sound(_with_display_matrix(0, -1, 1, 0), height=WIDTH, width=HEIGHT, rotation=270),
    "mirrored": Sound(_with_display_matrix(-1, 0, 0, 1)),
    "anamorphic": Sound(_anamorphic, width=2 * WIDTH),
    "wrong-duration": Sound(_wrong_header_duration),
    "edit-list": Sound(_edited, frames=FRAMES - HIDDEN),
}  # fmt: skip


def _index_first(path: Path, share: float) -> bytes:
    """An mp4 whose index comes first, with only a share of its data."""
    _fragmented(path, "+faststart")
    content = path.read_bytes()
    start, size = next(boxes(content, "mdat"))
    return content[: start + 8 + int(share * (size - 8))]


def _cut_between_packets(path: Path) -> None:
    content = _index_first(path, 1.0)
    path.write_bytes(content)
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        ends = [packet.pos + packet.size for packet in packets]
    path.write_bytes(content[: ends[11]])


def _truncated(path: Path) -> None:
    write_clip(path, scene())
    path.write_bytes(path.read_bytes()[:-100])


def _sound_only(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        tone = (0.3 * np.sin(np.arange(16000) / 20)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(tone, format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _reference_to_clip(text: str) -> Callable[[Path], None]:
    """A text that refers to a clip, `SECRET`, in the same folder."""

    def make(path: Path) -> None:
        secret = path.with_name(f"{path.stem}-secret.ts")
        write_clip(secret, scene())
        path.write_text(text.replace("SECRET", secret.name))

    return make


BROKEN: dict[str, Broken] = {
    "empty": Broken(lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "truncated": Broken(_truncated, "is cut short: the index of this mp4 is missing"),
    "promises-more": Broken(
        lambda path: path.write_bytes(_index_first(path, 0.6)), "its container promises 20 frames, 8 can be read"
    ),
    "cut-between-packets": Broken(_cut_between_packets, "its container promises 20 frames, 12 can be read"),
    "all-promise": Broken(lambda path: path.write_bytes(_index_first(path, 0.02)), "holds no frame|cannot be decoded"),
    "audio-only": Broken(_sound_only, r"holds no video stream \(audio only\)"),
    "junk": Broken(lambda path: path.write_bytes(np.random.default_rng(0).bytes(4096)), "it is no video"),
    "text": Broken(lambda path: path.write_text("A red ball rolls over the grass.\n" * 40), "it is no video"),
    "play-list": Broken(
        _reference_to_clip("#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nSECRET\n#EXT-X-ENDLIST\n"),
        "it is no video",
    ),
    "list-of-files": Broken(_reference_to_clip("ffconcat version 1.0\nfile 'SECRET'\n"), "it is no video"),
}


def make(name: str, folder: Path) -> Path:
    """Writes the clip of a kind of `SOUND` or `BROKEN` into a folder, which is made; its path."""
    kind = {**SOUND, **BROKEN}[name]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{kind.suffix}"
    kind.make(path)
    return path
