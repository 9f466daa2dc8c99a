"""Where captioned clips come from: folders, tables, webdataset archives. Each clip becomes a `ClipEntry`.

A source lists its clips one by one and reads none, so a listing of millions of clips needs no memory. Every listing
gives the same entries in the same order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from braceexpand import braceexpand

from data.pack.archive_source import ArchiveSource
from data.pack.entries import ClipEntry, Columns
from data.pack.folder_source import FolderSource
from data.pack.table_source import TABLE_SUFFIXES, TableSource
from data.storage.store import Store, check_location, expand, is_pipe, is_remote, local_path


class ClipSource(Protocol):
    """Captioned clips in a fixed order."""

    def entries(self) -> Iterator[ClipEntry]:
        """All clips of the source, and items in their place that are no clips."""


def open_source(location: str, columns: Columns, store: Store, work: Path, *, allow_pipe: bool = False) -> ClipSource:
    """The source at a location.

    Args:
        location: a folder; a table; an archive, also by braces or wildcards; a command, if allowed.
        columns: names of captions and clips in it.
        store: reads it.
        work: folder for the contents of archives and the output of commands.
        allow_pipe: whether a command may run.

    Raises:
        ValueError: if nothing at the location can be read.
    """
    check_location(location, allow_pipe=allow_pipe)
    if is_pipe(location):
        return ArchiveSource(list(braceexpand(location)), columns, store, work)
    if not is_remote(location) and local_path(location).is_dir():
        return FolderSource(local_path(location), columns)
    name = urlsplit(location).path if is_remote(location) else location
    if name.lower().endswith(TABLE_SUFFIXES) and (is_remote(location) or local_path(location).is_file()):
        return TableSource(location, columns, store)
    if name.lower().endswith(".tar"):
        found = expand(location)
        if any(is_remote(archive) or local_path(archive).is_file() for archive in found):
            return ArchiveSource(found, columns, store, work)
    raise ValueError(
        f"{location} is neither a folder of clips and captions, nor a table ({', '.join(TABLE_SUFFIXES)}), "
        "nor webdataset archives (.tar, also with braces or wildcards)."
    )
