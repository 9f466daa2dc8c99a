"""Where samples lie: which shards are meant, and the places of their samples, from records alone."""

import contextlib
import gc
import logging
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.shards.format import Member, Members, read_index, read_member
from data.storage.store import Store, expand, is_remote, join, local_path

log = logging.getLogger(__name__)

#: Samples whose places a process keeps, about 100 bytes each.
_PLACES = 1 << 19
_LOCK = threading.Lock()


@dataclass(frozen=True)
class Source:
    """A folder of shards and what of its index is used.

    Args:
        folder: path or URL.
        index: with the shards that are used.
    """

    folder: str
    index: Mapping[str, Any]


def find_shards(locations: Sequence[str], format: str, store: Store) -> list[Source]:
    """Folders of shards by path, URL, wildcard or brace notation; of a `.tar` only that shard of its folder is used.

    Raises:
        ValueError: if one matches nothing, holds no shards of this format, or comes twice.
        StoreError: if a store does not answer.
    """
    if not locations or not all(locations):
        raise ValueError(f"got shards {list(locations)}, expected at least one folder of them, and a name for each.")
    chosen: dict[str, list[str] | None] = {}
    spelled: dict[str, str] = {}  # where a folder really lies -> the name it goes by
    for location in locations:
        for name in expand(str(location)):
            place, _, shard = name.rstrip("/").rpartition("/") if name.endswith(".tar") else (name, "", "")
            folder = _tidy(place or (name[0] if name.startswith("/") else "."))
            first = spelled.setdefault(folder if is_remote(folder) else os.path.realpath(folder), folder)
            if shard:
                shards = chosen.setdefault(first, [])
                taken = shards is None or shard in shards
                if shards is not None:
                    shards.append(shard)
            else:
                taken = first in chosen
                chosen[first] = None
            if taken:
                also = "" if first == folder else f" (as {first})"
                raise ValueError(f"{name} comes twice in the shards {list(locations)}{also}; name each once.")
    sources = []
    for folder, names in chosen.items():
        index = read_index(folder, store, format)
        known = {entry["name"] for entry in index["shards"]}
        if names is not None and (unknown := [name for name in names if name not in known]):
            raise ValueError(
                f"{folder} has no shards {unknown[:5]} in its index; expected some of {sorted(known)[:5]}."
            )
        kept = [entry for entry in index["shards"] if names is None or entry["name"] in names]
        sources.append(Source(folder, {**index, "shards": kept}))
    return sources


def _tidy(folder: str) -> str:
    """One spelling of a folder: `./a//b/` and `file://a/b` are `a/b`."""
    return folder.rstrip("/") if is_remote(folder) else os.path.normpath(local_path(folder))


def warn_of_copies(sources: Sequence[Source]) -> None:
    """Warns of shards with the same content, whose samples are visited as often as there are copies."""
    seen: dict[str, str] = {}
    for source in sources:
        for entry in source.index["shards"]:
            shard, digest = join(source.folder, entry["name"]), entry.get("sha256")
            if digest and seen.setdefault(digest, shard) != shard:
                log.warning("%s is a copy of %s: its samples are visited once more", shard, seen[digest])


def check_cache(folder: Path) -> None:
    """Whether a folder for what is read of remote shards is there, or can be made.

    Raises:
        ValueError: if it cannot.
    """
    nearest = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written" if nearest.is_dir() else "is not a folder"
        raise ValueError(
            f"got cache {folder}, but {nearest} {what}; expected a local folder, there or to be made. Set data.cache."
        )


def sample_count(sources: Sequence[Source]) -> int:
    """Samples of some folders."""
    return sum(entry["samples"] for source in sources for entry in source.index["shards"])


class Table:
    """Keys and places of a shard's samples, without an object for each."""

    def __init__(self, samples: Sequence[tuple[str, Members]]) -> None:
        self._keys = [key for key, _ in samples]
        self._extensions = sorted({extension for _, members in samples for extension in members})
        absent = Member(-1, -1)
        self._version = next((m.version for _, members in samples for m in members.values()), "")
        found = [[members.get(e, absent) for e in self._extensions] for _, members in samples]
        self._places = np.array([[(m.offset, m.size) for m in row] for row in found], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, place: int) -> tuple[str, Members]:
        rows = self._places[place].tolist()
        found = zip(self._extensions, rows, strict=True)
        return self._keys[place], {e: Member(m[0], m[1], self._version) for e, m in found if m[1] >= 0}


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: a record's thousands of short-lived lists set it off, and it goes through torch."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Tables:
    """The tables that were used last, bounded by their samples."""

    def __init__(self) -> None:
        self._tables: OrderedDict[int, Table] = OrderedDict()

    def get(self, shard: int, read: Callable[[], Table]) -> Table:
        with _LOCK:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
            with _no_collection():
                table = self._tables[shard] = read()
            while len(self._tables) > 1 and sum(map(len, self._tables.values())) > _PLACES:
                self._tables.popitem(last=False)
            return table


def read_near(shard: str, members: Sequence[Member], store: Store, gap: int = 1 << 14) -> list[bytes]:
    """The bytes of several files of an archive, in one read if they lie next to one another.

    Raises:
        ValueError: if the archive ends before.
        OSError: if it cannot be read.
    """
    first, last = min(m.offset for m in members), max(m.offset + m.size for m in members)
    if last - first > sum(m.size for m in members) + gap:
        return [read_member(shard, m, store) for m in members]
    content = store.read(shard, first, last - first, version=members[0].version)
    return [content[m.offset - first : m.offset - first + m.size] for m in members]
