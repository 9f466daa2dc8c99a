"""Finds folders of shards by path, URL, wildcard or braces, and reads their index."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.families import VideoFamily, index_family
from data.shards.format import read_index
from data.storage.store import Store, expand, is_remote, join, local_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IndexedShards:
    """A folder of shards with its index.

    Args:
        folder: path or URL of the folder.
        index: content of `index.json`; "shards" lists only the shards in use.
    """

    folder: str
    index: Mapping[str, Any]

    @property
    def family(self) -> VideoFamily:
        """The family of models that the shards were made for.

        Raises:
            ValueError: if this version does not know it.
        """
        return index_family(self.index)


def find_shards(locations: str | Sequence[str], format: str, store: Store) -> list[IndexedShards]:
    """Finds folders of shards by path, URL, wildcard or braces; a `.tar` selects only that shard of its folder.

    Args:
        locations: one or several locations.
        format: name of the format that the index must have.
        store: store that reads the index.

    Raises:
        ValueError: if a location matches nothing, holds no shards of this format or of a family that is not known, or
            is given twice.
        StoreError: if a store does not answer.
    """
    locations = [str(location) for location in ([locations] if isinstance(locations, (str, Path)) else locations)]
    if not locations or not all(locations):
        raise ValueError(f"got shards {locations}, expected at least one folder of them, and a name for each.")
    found = []
    for folder, names in _chosen(locations).items():
        index = read_index(folder, store, format)
        known = {entry["name"] for entry in index["shards"]}
        if names is not None and (unknown := [name for name in names if name not in known]):
            raise ValueError(
                f"{folder} has no shards {unknown[:5]} in its index; expected some of {sorted(known)[:5]}."
            )
        used = [entry for entry in index["shards"] if names is None or entry["name"] in names]
        found.append(IndexedShards(folder, {**index, "shards": used}))
        try:
            index_family(index)
        except ValueError as error:
            raise ValueError(
                f"{join(folder, 'index.json')}: {error} Update reblock, or make the shards again."
            ) from error
    return found


def _chosen(locations: Sequence[str]) -> dict[str, list[str] | None]:
    """The folders that the locations name, each with the names of its chosen shards, or None for all."""
    chosen: dict[str, list[str] | None] = {}
    spelled: dict[str, str] = {}  # real path of a folder -> its first spelling
    for location in locations:
        for name in expand(location):
            parent, _, shard = name.rstrip("/").rpartition("/") if name.endswith(".tar") else (name, "", "")
            folder = _normal_name(parent or (name[0] if name.startswith("/") else "."))
            first = spelled.setdefault(folder if is_remote(folder) else os.path.realpath(folder), folder)
            if shard:
                shards = chosen.setdefault(first, [])
                repeated = shards is None or shard in shards
                if shards is not None:
                    shards.append(shard)
            else:
                repeated = first in chosen
                chosen[first] = None
            if repeated:
                also = "" if first == folder else f" (as {first})"
                raise ValueError(f"{name} comes twice in the shards {list(locations)}{also}; name each once.")
    return chosen


def _normal_name(folder: str) -> str:
    """One spelling of a folder: `./a//b/` and `file://a/b` are `a/b`."""
    return folder.rstrip("/") if is_remote(folder) else os.path.normpath(local_path(folder))


def sample_count(folders: Sequence[IndexedShards]) -> int:
    """Number of samples in the folders."""
    return sum(entry["samples"] for folder in folders for entry in folder.index["shards"])


def bucket_names(folders: Sequence[IndexedShards]) -> list[str]:
    """Sorted names of the buckets in the folders, without repetition."""
    return sorted({entry["bucket"] for folder in folders for entry in folder.index["shards"]})


def warn_of_copies(folders: Sequence[IndexedShards]) -> None:
    """Warns of shards with the same content, since each copy adds another visit to the same samples."""
    seen: dict[str, str] = {}
    for folder in folders:
        for entry in folder.index["shards"]:
            shard, digest = join(folder.folder, entry["name"]), entry.get("sha256")
            if digest and seen.setdefault(digest, shard) != shard:
                log.warning("%s is a copy of %s: its samples are visited once more", shard, seen[digest])


def check_cache(folder: Path) -> None:
    """Checks that the cache folder is writable, or can be created.

    Raises:
        ValueError: if neither is the case.
    """
    nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        what = "cannot be written" if nearest.is_dir() else "is not a folder"
        raise ValueError(
            f"got cache {folder}, but {nearest} {what}; expected a local folder, there or to be made. Set data.cache."
        )
