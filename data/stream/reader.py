"""Reads samples by shard and row. Byte ranges come from the sample table, so no archive is scanned."""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from safetensors import SafetensorError

from data.bucket import Bucket
from data.shards.archive import Members
from data.shards.format import Fault
from data.shards.sample_table import TableCache
from data.storage.store import Store, StoreError, is_remote, join
from data.stream.fault_log import FaultLog
from data.stream.shard_index import IndexedShards, find_shards

log = logging.getLogger(__name__)

#: Exceptions that reading a damaged sample raises.
DAMAGE = (ValueError, KeyError, OSError, SafetensorError)
#: After this many consecutive samples that the store fails to read, the rest of the shard counts as lost.
_MAX_STORE_FAILURES = 3


class Visit(NamedTuple):
    """One use of a sample. All random numbers for this sample are seeded from it.

    Args:
        uid: number of the visit.
        draw: (seed, epoch). None in validation and measurements, whose random numbers never change.
    """

    uid: int
    draw: tuple[int, int] | None = None


class StreamSample(Protocol):
    """Fields that every kind of sample has.

    Args:
        faults: number of damaged samples that this one replaces.
        counts: whether the sample counts in an evaluation.
    """

    faults: int
    counts: bool


T = TypeVar("T", bound=StreamSample)


class ShardReader(ABC, Generic[T]):
    """Reads samples by shard number, in the order of the folders, and by row within the shard.

    Args:
        locations: shards of one format (folders, `.tar` files, wildcards, braces, URLs), or `IndexedShards`.
        format: name of the format that their index must have.
        store: store that reads the shards.
        max_fault_share: share of samples that may be damaged, 0 to 1.

    Raises:
        ValueError: if there are no shards of this format.
    """

    #: Whether a batch must come from one bucket, because samples of different buckets differ in shape.
    grouped = True
    #: Extensions of the sample's files that `decode` needs; None needs all of them.
    extensions: tuple[str, ...] | None = None

    def __init__(
        self,
        locations: Sequence[Any],
        format: str,
        *,
        store: Store | None = None,
        max_fault_share: float = 0.01,
    ) -> None:
        self.store = store or Store()
        self.folders = (
            [shards for shards in locations if isinstance(shards, IndexedShards)]
            or find_shards(locations, format, self.store)
        )  # fmt: skip
        families = [folder.family.name for folder in self.folders for _ in folder.index["shards"]]
        entries = [(folder.folder, entry) for folder in self.folders for entry in folder.index["shards"]]
        self.shards = [join(folder, entry["name"]) for folder, entry in entries]
        self.shard_sizes: list[int] = [entry["samples"] for _, entry in entries]
        self._digests = [entry.get("sha256") for _, entry in entries]
        self._locations = [(folder, entry["name"]) for folder, entry in entries]
        self.buckets = [
            Bucket.parse(entry["bucket"], family) for (_, entry), family in zip(entries, families, strict=True)
        ]
        self.group_names = [b.name for b in sorted(set(self.buckets))] if self.grouped else ["all"]
        self.remote = any(is_remote(folder.folder) for folder in self.folders)
        self.faults = FaultLog(sum(self.shard_sizes), max_fault_share)
        self._tables = TableCache()
        self._damaged: set[tuple[int, int]] = set()
        self._lost: dict[int, str] = {}  # shard that is no longer read -> reason
        self._store_failures: Counter[int] = Counter()  # shard -> failures since its last successful read

    def group(self, shard: int) -> str:
        """Name of the shard's group. Samples of one group may share a batch."""
        return self.buckets[shard].name if self.grouped else "all"

    def identity(self, shard: int) -> str:
        """The same string for a shard and its copies: the hash of its bytes, or its path if the index has no hash."""
        return self._digests[shard] or os.path.realpath(self.shards[shard])

    def try_load(self, shard: int, row: int, visit: Visit) -> T | None:
        """Reads a sample. If it is damaged, records it in the fault log and returns None.

        Args:
            shard: number of the shard.
            row: row of the sample in the shard.
            visit: visit that the sample is read for; it seeds the random numbers of this sample.

        Raises:
            ValueError: if more samples are damaged than `max_fault_share` allows.
        """
        if (shard, row) in self._damaged:
            return None
        try:
            key, files = self._read(shard, row)
            return self.decode(key, files, visit, self.buckets[shard])
        except DAMAGE as error:
            self._record_damage(shard, row, error)
            return None

    def _read(self, shard: int, row: int) -> tuple[str, dict[str, bytes]]:
        """Key of a sample, and its files by extension."""
        if shard in self._lost:
            raise StoreError(self._lost[shard])
        try:
            table = self._tables.read(shard, *self._locations[shard], self.store)
        except DAMAGE as error:
            self._lost[shard] = str(error)
            raise
        if row >= len(table):
            raise ValueError(f"its shard holds {len(table)} samples, the index says {self.shard_sizes[shard]}")
        key, members = table[row]
        try:
            files = self.read_files(self.shards[shard], members)
        except StoreError as error:
            # Retrying every sample of the shard would take hours.
            self._store_failures[shard] += 1
            if self._store_failures[shard] >= _MAX_STORE_FAILURES:
                self._lost[shard] = f"its store failed for {_MAX_STORE_FAILURES} samples in a row: {error}"
            raise
        self._store_failures.pop(shard, None)
        return key, files

    def read_files(self, shard: str, members: Members) -> dict[str, bytes]:
        """Reads the files of a sample that `decode` needs, by extension.

        Args:
            shard: path or URL of the archive.
            members: files of the sample in the archive, by extension.

        Raises:
            KeyError: if the sample lacks a needed file.
            ValueError, OSError: if a file cannot be read.
        """
        return read_members(shard, {name: members[name] for name in self.extensions or members}, self.store)

    def _record_damage(self, shard: int, row: int, error: Exception) -> None:
        self._damaged.add((shard, row))
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        fault = Fault(self._tables.key(shard, row) or f"sample {row}", reason, self.shards[shard])
        log.warning("%s: %s is damaged, another sample takes its place: %s", fault.shard, fault.key, fault.reason)
        try:
            self.faults.add(fault)
        except ValueError as stop:
            raise ValueError(str(stop)) from error

    @abstractmethod
    def decode(self, key: str, files: Mapping[str, bytes], visit: Visit, bucket: Bucket | None = None) -> T:
        """Decodes a sample from its files.

        Args:
            key: name of the sample inside its shard.
            files: content of each file, by extension.
            visit: visit that the sample is read for; it seeds the random numbers of this sample.
            bucket: bucket that the sample must belong to; None accepts any bucket of the reader.

        Raises:
            ValueError, KeyError, OSError, SafetensorError: if the sample is damaged.
        """


def read_members(shard: str, members: Members, store: Store, gap: int = 1 << 14) -> dict[str, bytes]:
    """Reads several files of an archive, by extension; files that lie close together take one request.

    Args:
        shard: path or URL of the archive.
        members: files to read, by extension.
        store: store that reads the archive.
        gap: most unneeded bytes that one request may read.

    Raises:
        ValueError: if the archive ends before the last file does.
        OSError: if the archive cannot be read.
    """
    start, end = min(m.offset for m in members.values()), max(m.offset + m.size for m in members.values())
    if end - start > sum(m.size for m in members.values()) + gap:
        return {name: store.read(shard, m.offset, m.size, version=m.version) for name, m in members.items()}
    content = store.read(shard, start, end - start, version=next(iter(members.values())).version)
    return {name: content[m.offset - start : m.offset - start + m.size] for name, m in members.items()}
