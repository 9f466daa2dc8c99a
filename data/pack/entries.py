"""Captioned clips as a source lists them, before any of them is read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from data.storage.store import Store, is_remote, local_path

#: Extensions of clips.
VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi", "m4v")


@dataclass(frozen=True)
class Columns:
    """Names of captions and clips in the source.

    Args:
        caption_suffix: of the caption files beside the clips of a folder; of the caption members of an archive.
        caption_field: of a JSON file in place of a caption file.
        clip: column of a table with the path or URL of the clip.
        caption: column of a table with the caption.
    """

    caption_suffix: str = ".txt"
    caption_field: str = "caption"
    clip: str = "clip"
    caption: str = "caption"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A file or a part of a file.

    Args:
        location: path or URL of the file.
        offset: of the first byte.
        size: in bytes; None for the whole file.
    """

    location: str
    offset: int = 0
    size: int | None = None

    @property
    def path(self) -> Path | None:
        """The path, if this is a whole file on this machine."""
        whole = self.size is None and not is_remote(self.location)
        return local_path(self.location).absolute() if whole else None

    def read(self, store: Store) -> bytes:
        """The bytes; errors as `Store.read`."""
        return store.read(self.location, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class ClipEntry:
    """A clip that a source lists, or an item in its place that is no clip.

    Args:
        key: its name in the shards.
        source: its name in the source.
        shard: table or archive that lists it; empty for a folder.
        clip: the video file.
        extension: of the clip, lower case.
        caption: the text, or the file that holds it.
        field: of the JSON object in that file; None if the file is plain text.
        problem: why the clip cannot be used, if that is known without reading it.
    """

    key: str
    source: str
    shard: str = ""
    clip: ByteRange | None = None
    extension: str = ""
    caption: str | ByteRange | None = None
    field: str | None = None
    problem: str | None = None

    def read_caption(self, store: Store) -> str:
        """The caption, stripped.

        Raises:
            ValueError: if it is not UTF-8, or no text in a JSON object.
            OSError: if it cannot be read.
        """
        assert self.caption is not None
        if isinstance(self.caption, str):
            return self.caption.strip()
        try:
            text = self.caption.read(store).decode("utf-8-sig")  # some editors write a byte order mark
        except UnicodeDecodeError as error:
            raise ValueError(f"its caption is not UTF-8 ({error.reason} at byte {error.start})") from error
        if self.field is None:
            return text.strip()
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"its caption is not JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get(self.field), str):
            got = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"its JSON has {got}, expected the caption as text under {self.field!r}")
        caption = str(value[self.field]).strip()
        if printable(caption) != caption:  # JSON can hold lone surrogates
            raise ValueError("its caption is not Unicode")
        return caption


def printable(text: str) -> str:
    """The text with backslash escapes for what is not Unicode; file names may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def make_key(name: str) -> str:
    """A key from a relative path without its suffix: `/` becomes `--`, `.` becomes `_`."""
    return printable("--".join(part for part in name.replace("\\", "/").split("/") if part)).replace(".", "_")


def split_suffix(name: str) -> tuple[str, str]:
    """Path without its suffix, and the suffix in lower case without its dot."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix[1:].lower()
