"""Reads samples by shard and row: records hold the byte range of each file of a sample, so no archive is scanned."""

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

#: What a damaged sample raises.
DAMAGE = (ValueError, KeyError, OSError, SafetensorError)
#: Samples of one shard, one after another, that a store fails to read before the rest of the shard counts as lost.
_MAX_STORE_FAILURES = 3


class Visit(NamedTuple):
    """One use of a sample: all that is drawn for it is keyed by this.

    Args:
        uid: of the visit.
        draw: (seed, epoch); None in validation and measurements, which draw the same in every epoch and run.
    """

    uid: int
    draw: tuple[int, int] | None = None


class StreamSample(Protocol):
    """What every kind of sample tells of its visit.

    Args:
        faults: damaged samples that were skipped before this one took their place.
        counts: whether it counts in an evaluation.
    """

    faults: int
    counts: bool


T = TypeVar("T", bound=StreamSample)


class ShardReader(ABC, Generic[T]):
    """Reads samples of shards, which are numbered in the order of their folders; rows number the samples of a shard.

    Args:
        locations: of shards of one kind (folders, `.tar` files, wildcards, braces, URLs), or shards that were found.
        format: of their index.
        store: that reads them.
        max_fault_share: share of samples that may be damaged.

    Raises:
        ValueError: if there are no shards of this format.
    """

    #: Whether samples of different buckets have different shapes, and so may not share a batch.
    grouped = True
    #: Extensions of the files of a sample that `decode` needs; None for all of them.
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
        entries = [(folder.folder, entry) for folder in self.folders for entry in folder.index["shards"]]
        self.shards = [join(folder, entry["name"]) for folder, entry in entries]
        self.shard_sizes: list[int] = [entry["samples"] for _, entry in entries]
        self._digests = [entry.get("sha256") for _, entry in entries]
        self._names = [(folder, entry["name"]) for folder, entry in entries]
        self.buckets = [Bucket.parse(entry["bucket"]) for _, entry in entries]
        self.group_names = [b.name for b in sorted(set(self.buckets))] if self.grouped else ["all"]
        self.remote = any(is_remote(folder.folder) for folder in self.folders)
        self.faults = FaultLog(sum(self.shard_sizes), max_fault_share)
        self._tables = TableCache()
        self._damaged: set[tuple[int, int]] = set()
        self._lost: dict[int, str] = {}  # shard -> why none of its samples is read any more
        self._store_failures: Counter[int] = Counter()  # of each shard, since its last sample that was read

    def group(self, shard: int) -> str:
        """Name of the group of samples that those of a shard may share a batch with."""
        return self.buckets[shard].name if self.grouped else "all"

    def identity(self, shard: int) -> str:
        """What a shard and its copies have in common: the hash of their bytes; without one in the index, the path."""
        return self._digests[shard] or os.path.realpath(self.shards[shard])

    def try_load(self, shard: int, row: int, visit: Visit) -> T | None:
        """A sample; None if it is damaged, which the fault log then names.

        Args:
            shard: its number.
            row: of the sample in its shard.
            visit: for which it is read.

        Raises:
            ValueError: past the share of damaged samples.
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
        """Key and files of a sample."""
        if shard in self._lost:
            raise StoreError(self._lost[shard])
        try:
            table = self._tables.read(shard, *self._names[shard], self.store)
        except DAMAGE as error:
            self._lost[shard] = str(error)
            raise
        if row >= len(table):
            raise ValueError(f"its shard holds {len(table)} samples, the index says {self.shard_sizes[shard]}")
        key, members = table[row]
        try:
            files = self.read_files(self.shards[shard], members)
        except StoreError as error:
            # Requests for every sample of the shard, each with its retries, would take hours.
            self._store_failures[shard] += 1
            if self._store_failures[shard] >= _MAX_STORE_FAILURES:
                self._lost[shard] = f"its store failed for {_MAX_STORE_FAILURES} samples in a row: {error}"
            raise
        self._store_failures.pop(shard, None)
        return key, files

    def read_files(self, shard: str, members: Members) -> dict[str, bytes]:
        """The files of a sample that `decode` needs.

        Args:
            shard: path or URL of the archive.
            members: of the sample.

        Raises:
            KeyError: if one of them is not in the record.
            ValueError, OSError: if one cannot be read.
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
        """A sample of its files.

        Args:
            key: of the sample.
            files: extension -> content.
            visit: for which it is read.
            bucket: that it has to be of; None takes any of the reader's.

        Raises:
            ValueError, KeyError, OSError, SafetensorError: if it is damaged.
        """


def read_members(shard: str, members: Members, store: Store, gap: int = 1 << 14) -> dict[str, bytes]:
    """The bytes of several files of an archive by extension; files that lie close together are read at once.

    Args:
        shard: path or URL of the archive.
        members: extension -> member.
        store: that reads them.
        gap: bytes between the files that may be read in vain, in all.

    Raises:
        ValueError: if the archive ends before.
        OSError: if it cannot be read.
    """
    start, end = min(m.offset for m in members.values()), max(m.offset + m.size for m in members.values())
    if end - start > sum(m.size for m in members.values()) + gap:
        return {name: store.read(shard, m.offset, m.size, version=m.version) for name, m in members.items()}
    content = store.read(shard, start, end - start, version=next(iter(members.values())).version)
    return {name: content[m.offset - start : m.offset - start + m.size] for name, m in members.items()}
