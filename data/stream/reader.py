"""Samples out of shards, read by place: from the record of a shard it is known where each lies, nothing is scanned.

Legend: C channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
from safetensors import SafetensorError
from torch.utils.data import Dataset

from data.bucket import Bucket
from data.shards.format import Fault, Members, read_samples
from data.storage.store import Store, StoreError, is_remote, join
from data.stream.fault_log import FaultLog
from data.stream.shard_index import Source, Table, Tables, find_shards

log = logging.getLogger(__name__)
T = TypeVar("T")
V = TypeVar("V")

#: What a damaged sample raises.
DAMAGE = (ValueError, KeyError, OSError, SafetensorError)
#: Samples of one shard whose store gave up, one after another, before the rest of the shard counts as lost.
_PATIENCE = 3
#: Keeps draws of replacements apart from others that are keyed by a uid.
_REPLACEMENT = 0x7265706C616365
#: How many replacements are drawn for a visit before all that are left are tried in turn.
_DRAWS = 64
#: Reads of a remote store at the same time, per loader process.
_READERS = 16


@lru_cache(maxsize=1)
def _readers(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="reblock-read")


class ShardDataset(Dataset[T], ABC, Generic[T]):
    """Samples of shards, by number: those of each shard in turn.

    A damaged sample is named in the fault log and another one takes its place, drawn by the number of the visit (see
    `candidates`); past a share the run stops.

    Args:
        locations: of shards of one kind (folders, `.tar` files, wildcards, braces, URLs), or sources that were found.
        format: of their index.
        store: that reads them.
        max_fault_share: share of samples that may be damaged.

    Raises:
        ValueError: if there are no shards of this format.
    """

    #: Whether samples of different buckets have different shapes, and so may not share a batch.
    grouped = True

    def __init__(
        self,
        locations: Sequence[Any],
        format: str,
        *,
        store: Store | None = None,
        max_fault_share: float = 0.01,
    ) -> None:
        self.store = store or Store()
        self.sources = (
            [s for s in locations if isinstance(s, Source)]
            or find_shards([str(location) for location in locations], format, self.store)
        )  # fmt: skip
        entries = [(source.folder, entry) for source in self.sources for entry in source.index["shards"]]
        self.shards = [join(folder, entry["name"]) for folder, entry in entries]
        self.shard_sizes: list[int] = [entry["samples"] for _, entry in entries]
        self._digests = [entry.get("sha256") for _, entry in entries]
        self._folders = [(folder, entry["name"]) for folder, entry in entries]
        self.buckets = [Bucket.parse(entry["bucket"]) for _, entry in entries]
        self.group_names = [b.name for b in sorted(set(self.buckets))] if self.grouped else ["all"]
        self.remote = any(is_remote(source.folder) for source in self.sources)
        self.faults = FaultLog(sum(self.shard_sizes), max_fault_share)
        self._starts = np.cumsum([0, *self.shard_sizes])
        self._tables = Tables()
        self._damaged: set[tuple[int, int]] = set()
        self._lost: dict[int, str] = {}
        self._strikes: Counter[int] = Counter()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, number: int) -> T:
        """Sample `number` under its number as uid.

        Raises:
            IndexError: if there is none.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"got sample {number}, expected 0 to {len(self) - 1}")
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        alike = [s for s in range(len(self.shards)) if self.group(s) == self.group(shard)]
        runs = [(s, 0, self.shard_sizes[s]) for s in alike]
        place = number - int(self._starts[shard])
        return self.first_readable(candidates(runs, alike.index(shard), place, number), uid=number)

    def group(self, shard: int) -> str:
        """Name of the group of samples that those of a shard may share a batch with."""
        return self.buckets[shard].name if self.grouped else "all"

    def identity(self, shard: int) -> str:
        """What a shard and its copies have in common: the hash of their bytes; without one in the index, the place."""
        return self._digests[shard] or os.path.realpath(self.shards[shard])

    def map(self, function: Callable[[int], V], items: Sequence[int]) -> list[V]:
        """`function` of each item in order; many at a time where the shards are remote."""
        if not self.remote or len(items) < 2:
            return [function(item) for item in items]
        return list(_readers(os.getpid()).map(function, items))

    def first_readable(self, choices: Iterator[tuple[int, int]], uid: int, *, counts: bool = True) -> T:
        """The first of some samples, (shard, place) each, that is not damaged.

        Args:
            choices: the sample that is meant, and those that may take its place, each once.
            uid: what the sample is called: it keys what is drawn for it.
            counts: whether the sample counts in an evaluation.

        Raises:
            ValueError: past the share of damaged samples, or if none can be read.
        """
        for passed, (shard, place) in enumerate(choices):
            if (shard, place) in self._damaged:
                continue
            try:
                sample = self._read(shard, place, uid)
            except DAMAGE as error:
                self._note(shard, place, error)
            else:
                self.mark(sample, passed, counts)
                return sample
        raise ValueError(f"no sample of {[s.folder for s in self.sources]} can be read; make the shards again.")

    def _read(self, shard: int, place: int, uid: int) -> T:
        if shard in self._lost:
            raise StoreError(self._lost[shard])
        try:
            table = self._tables.get(shard, lambda: Table(read_samples(*self._folders[shard], self.store)))
        except DAMAGE as error:
            self._lost[shard] = str(error)
            raise
        if place >= len(table):
            raise ValueError(f"its shard holds {len(table)} samples, the index says {self.shard_sizes[shard]}")
        key, members = table[place]
        try:
            sample = self.load(self.shards[shard], key, members, uid, self.buckets[shard])
        except StoreError as error:
            # Asking for each of its samples again and again would take hours.
            self._strikes[shard] += 1
            if self._strikes[shard] >= _PATIENCE:
                self._lost[shard] = f"its store failed for {_PATIENCE} samples in a row: {error}"
            raise
        self._strikes.pop(shard, None)
        return sample

    def _note(self, shard: int, place: int, error: Exception) -> None:
        self._damaged.add((shard, place))
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        fault = Fault(self._key(shard, place), reason, self.shards[shard])
        log.warning("%s: %s is damaged, another sample takes its place: %s", fault.shard, fault.key, fault.reason)
        try:
            self.faults.note(fault)
        except ValueError as stop:
            raise ValueError(str(stop)) from error

    def _key(self, shard: int, place: int) -> str:
        try:
            return self._tables.get(shard, _unread)[place][0]
        except (LookupError, OSError):
            return f"sample {place}"

    @abstractmethod
    def load(self, shard: str, key: str, members: Members, uid: int, bucket: Bucket | None = None) -> T:
        """Reads one sample of a shard.

        Args:
            shard: the archive.
            key: of the sample.
            members: where its files lie.
            uid: what it is called.
            bucket: that it has to be of; None takes any of the data set's.

        Raises:
            ValueError, KeyError, OSError, SafetensorError: if it is damaged.
        """

    @abstractmethod
    def mark(self, sample: T, faults: int, counts: bool) -> None:
        """Notes on a sample how many damaged ones it stands for, and whether it counts."""


def candidates(runs: Sequence[tuple[int, int, int]], turn: int, place: int, uid: int) -> Iterator[tuple[int, int]]:
    """(shard, sample) of runs of samples, each once: the one that is meant, and those that may take its place.

    These are drawn, keyed by uid and attempt alone, so that the visits of a lost shard spread over all that is left,
    and any rank and process finds the same. After `_DRAWS` of them come all others in turn, from the last one drawn.

    Args:
        runs: (shard, first sample, samples) each.
        turn: the run of the sample that is meant.
        place: its number in that run.
        uid: of the visit.
    """
    given = {(runs[turn][0], runs[turn][1] + place)}
    yield from given
    ends = np.cumsum([count for _, _, count in runs])
    for drawn in np.random.default_rng([_REPLACEMENT, uid]).integers(ends[-1], size=_DRAWS).tolist():
        turn = int(np.searchsorted(ends, drawn, side="right"))
        shard, first, count = runs[turn]
        place = drawn - int(ends[turn]) + count
        if (shard, first + place) not in given:
            given.add((shard, first + place))
            yield shard, first + place
    yield from (choice for choice in circle(runs, turn, place) if choice not in given)


def circle(runs: Sequence[tuple[int, int, int]], turn: int, place: int) -> Iterator[tuple[int, int]]:
    """(shard, sample) of runs of samples, each once, from one sample on and around to it.

    Args:
        runs: (shard, first sample, samples) each.
        turn: the run to start in.
        place: the sample of that run to start with.
    """
    for lap in range(len(runs) + 1):
        shard, first, count = runs[(turn + lap) % len(runs)]
        begin = place if lap == 0 else 0
        end = place if lap == len(runs) else count
        for own in range(begin, end):
            yield shard, first + own


def _unread() -> Table:
    raise LookupError
