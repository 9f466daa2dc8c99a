"""Opening a clip: its container, its video stream, and the packets and frames of that stream in order."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
from av.container import InputContainer

#: Containers that may be opened. Clips come from anyone, and the other formats include play lists: FFmpeg would open
#: the files and addresses that they name, whatever the clip's own file is called.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,mxf,ivf,nut"


def clip_name(source: Path | bytes) -> str:
    """A clip's name for messages."""
    return f"clip of {len(source)} bytes" if isinstance(source, bytes) else str(source)


@contextmanager
def open_clip(source: Path | bytes) -> Iterator[InputContainer]:
    """Opens a clip; FFmpeg's errors inside the block become ValueErrors.

    Raises:
        ValueError: if the clip is empty, is no video, or FFmpeg fails inside the block.
    """
    _check_not_empty(source)
    recognised = False
    try:
        handle = io.BytesIO(source) if isinstance(source, bytes) else str(source)
        with av.open(handle, mode="r", options={"format_whitelist": _CONTAINERS}) as container:
            recognised = True
            _check_video(container, source)
            video_stream(container).codec_context.thread_count = 1
            yield container
    except (av.FFmpegError, OSError) as error:
        unknown_format = not recognised and isinstance(error, av.error.InvalidDataError | av.error.ArgumentError)
        reason = _why_unrecognised(source) if unknown_format else _ffmpeg_message(error)
        raise ValueError(f"{clip_name(source)} cannot be decoded ({reason}); use a whole video.") from error


def video_stream(container: InputContainer) -> av.VideoStream:
    """The first video stream that is not a cover picture."""
    return next(s for s in container.streams.video if not s.disposition & s.disposition.attached_pic)


def demux(container: InputContainer) -> Iterator[av.Packet]:
    """Packets of the video stream in decoding order; a packet that is marked corrupt is the last one."""
    try:
        for packet in container.demux(video_stream(container)):
            yield packet
            if packet.is_corrupt:
                return
    except av.error.InvalidDataError:  # from the demuxer: errors of the code that consumes the packets do not come here
        end = av.Packet()
        end.is_corrupt = True
        yield end


def decode_frames(container: InputContainer) -> Iterator[av.VideoFrame]:
    """Frames in presentation order, up to the first incomplete packet."""
    for packet in demux(container):
        if packet.is_corrupt:
            yield from video_stream(container).decode(None)
        else:
            yield from packet.decode()  # the last packet is empty and flushes the decoder


def _check_not_empty(source: Path | bytes) -> None:
    if isinstance(source, bytes):
        empty = not source
    else:
        empty = source.is_file() and not source.stat().st_size
    if empty:
        raise ValueError(f"{clip_name(source)} is empty (0 bytes); use a whole video.")


def _check_video(container: InputContainer, source: Path | bytes) -> None:
    if all(s.disposition & s.disposition.attached_pic for s in container.streams.video):
        kinds = sorted({"cover" if stream.type == "video" else stream.type for stream in container.streams})
        if not kinds:
            raise ValueError(f"{clip_name(source)} cannot be decoded ({_why_unrecognised(source)}); use a whole video.")
        only = f"({' and '.join(kinds)} only)"
        raise ValueError(f"{clip_name(source)} holds no video stream {only}; use a clip with a picture.")
    if video_stream(container).codec_context is None:
        raise ValueError(f"{clip_name(source)} has a codec that is not known here; convert it to H.264.")


def _ffmpeg_message(error: BaseException) -> str:
    """FFmpeg's message without the file's name."""
    return str(getattr(error, "strerror", None) or "FFmpeg failed").lower()


def _why_unrecognised(source: Path | bytes) -> str:
    """Why FFmpeg found no video: an mp4's index usually comes last, so a file that is cut short lacks it."""
    if isinstance(source, Path) and not source.is_file():
        return "it is no file"
    names: list[bytes] = []
    end = 0  # of the boxes, by the sizes in their headers
    with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
        while len(header := file.read(16)) >= 8 and len(names) < 64:
            size = int.from_bytes(header[8:] if header[:4] == b"\0\0\0\1" else header[:4], "big")
            names.append(header[4:8])
            end += size
            if size < 8:
                break
            file.seek(end)
        complete = end <= file.seek(0, io.SEEK_END)
    cut = names[:1] == [b"ftyp"] and (b"moov" not in names or not complete)
    return "it is cut short: the index of this mp4 is missing" if cut else "it is no video"
