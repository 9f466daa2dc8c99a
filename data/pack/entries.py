"""Captioned clips as a source names them, before any of them is read."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from data.storage.store import Store, is_remote, local_path

#: What counts as a clip.
VIDEO_EXTENSIONS = ("mp4", "mov", "mkv", "webm", "avi", "m4v")


@dataclass(frozen=True)
class Columns:
    """What captions and clips are called in the source.

    Args:
        caption_suffix: of the caption files beside the clips of a folder; of the caption members of an archive.
        caption_field: of a JSON file that is there instead.
        clip: column of a table with the path or URL of the clip.
        caption: column of a table with the caption.
    """

    caption_suffix: str = ".txt"
    caption_field: str = "caption"
    clip: str = "clip"
    caption: str = "caption"


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes somewhere: a file, or a part of one.

    Args:
        location: path or URL of the file.
        offset: first byte.
        size: how many; None for the whole file.
    """

    location: str
    offset: int = 0
    size: int | None = None

    @property
    def path(self) -> Path | None:
        """The file, if it is a whole one on this machine."""
        whole = self.size is None and not is_remote(self.location)
        return local_path(self.location).absolute() if whole else None

    def read(self, store: Store) -> bytes:
        """The bytes; errors as `Store.read`."""
        return store.read(self.location, self.offset, self.size)


@dataclass(frozen=True, slots=True)
class Entry:
    """A clip of a source, or what is there in place of one.

    Args:
        key: its name in the shards.
        source: its name in the source.
        shard: table or archive that names it; empty for a folder.
        clip: where it is.
        extension: of the clip, lower case.
        caption: the text, or where it is.
        field: of the JSON object that `caption` is; None where it is plain text.
        problem: why it cannot be used, known without reading it.
    """

    key: str
    source: str
    shard: str = ""
    clip: Piece | None = None
    extension: str = ""
    caption: str | Piece | None = None
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
            text = self.caption.read(store).decode("utf-8-sig")  # some editors begin with a mark
        except UnicodeDecodeError as error:
            raise ValueError(f"its caption is not UTF-8 ({error.reason} at byte {error.start})") from error
        if self.field is None:
            return text.strip()
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"its caption is not JSON ({error})") from error
        if not isinstance(value, dict) or not isinstance(value.get(self.field), str):
            there = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"its JSON has {there}, expected the caption as text under {self.field!r}")
        caption = str(value[self.field]).strip()
        if printable(caption) != caption:  # JSON can spell halves of characters
            raise ValueError("its caption is not Unicode")
        return caption


def printable(text: str) -> str:
    """The text with what is no Unicode (names of files may be any bytes) written as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def make_key(name: str) -> str:
    """A key from a relative path without its suffix: `/` becomes `--`, `.` becomes `_`."""
    return printable("--".join(part for part in name.replace("\\", "/").split("/") if part)).replace(".", "_")


def split_suffix(name: str) -> tuple[str, str]:
    """Path without its suffix, and the suffix in lower case without its dot."""
    stem, suffix = os.path.splitext(name)
    return stem, suffix[1:].lower()
