"""Parts of a data set: maps a visit to its sample, and replaces damaged samples."""

import bisect
import copy
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from data.stream.order import BatchGroup
from data.stream.reader import ShardReader, Visit

#: Part of the seed for replacements, so that they differ from other random numbers seeded by the uid.
_REPLACEMENT = 0x7265706C616365
#: Number of random replacements to try for a visit before the remaining samples are tried in order.
_MAX_DRAWS = 64
#: Number of threads in each loader process that read a remote store.
_THREADS = 16


class Run(NamedTuple):
    """Consecutive samples of a shard.

    Args:
        shard: number of the shard.
        first: row of the first sample.
        size: number of samples.
    """

    shard: int
    first: int
    size: int


class Split(Dataset):
    """Part of a data set: a run of consecutive samples from each shard.

    Positions number the samples in the order of the shards. Visit i reads the sample at position i % size under the
    uid `first_uid` + i, so each pass has its own random numbers. A damaged sample is replaced by a random one of the
    same group and split, under the same uid, which also seeds the choice. So the visits of a lost shard spread over the
    group, and the replacements do not depend on the number of ranks and processes.

    Args:
        reader: reader of all shards.
        firsts: row of the first sample of this part in each shard, (shards,).
        counts: number of samples of this part in each shard, (shards,).
        first_uid: uid of the first visit.
        once: whether visits of a second pass are left out of evaluations.
    """

    def __init__(
        self,
        reader: ShardReader,
        firsts: Sequence[int],
        counts: Sequence[int],
        *,
        first_uid: int = 0,
        once: bool = False,
    ) -> None:
        self.reader = reader
        self.first_uid = first_uid
        self._once = once
        self._draw: tuple[int, int] | None = None
        self._counts = np.array(counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64).tolist()
        runs: dict[str, list[Run]] = {name: [] for name in reader.group_names}
        self._number: dict[int, int] = {}  # shard -> index of its run within the group
        for run in (Run(*run) for run in zip(range(len(counts)), firsts, counts, strict=True) if run[-1]):
            group = runs[reader.group(run.shard)]
            self._number[run.shard] = len(group)
            group.append(run)
        self._runs = {name: group for name, group in runs.items() if group}

    def in_epoch(self, seed: int, epoch: int) -> "Split":
        """The same samples with the random draws of one epoch; without it the draws are the same in every epoch."""
        own = copy.copy(self)
        own._draw = (seed, epoch)
        return own

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def groups(self) -> list[BatchGroup]:
        """Groups of samples of one shape, in the order of their buckets."""
        starts = np.array(self._starts[:-1], dtype=np.int64)
        shards = {name: [run.shard for run in group] for name, group in self._runs.items()}
        return [BatchGroup(name, starts[numbers], self._counts[numbers]) for name, numbers in shards.items()]

    def runs(self) -> list[Run]:
        """The runs of all shards that have samples in this part."""
        return [run for group in self._runs.values() for run in group]

    def __getitem__(self, visit: int) -> Any:
        """The sample of a visit, or its replacement.

        Raises:
            IndexError: if the split is empty.
            ValueError: if more samples are damaged than the limit allows, or if no sample can be read.
        """
        if not len(self):
            raise IndexError("the split is empty")
        position = visit % len(self)
        shard = bisect.bisect_right(self._starts, position) - 1
        runs, uid = self._runs[self.reader.group(shard)], self.first_uid + visit
        choices = candidates(runs, self._number[shard], position - self._starts[shard], uid)
        for skipped, choice in enumerate(choices):
            sample = self.reader.try_load(*choice, Visit(uid, self._draw))
            if sample is not None:
                sample.faults, sample.counts = skipped, not self._once or visit < len(self)
                return sample
        folders = [folder.folder for folder in self.reader.folders]
        raise ValueError(f"no sample of {folders} can be read; make the shards again.")

    def __getitems__(self, visits: list[int]) -> list[Any]:
        """The samples of a batch; reads from a remote store run in parallel."""
        if not self.reader.remote or len(visits) < 2:
            return [self[visit] for visit in visits]
        return list(_threads(os.getpid()).map(self.__getitem__, visits))


@lru_cache(maxsize=1)
def _threads(process: int) -> ThreadPoolExecutor:
    """The thread pool of a process. Its id is the cache key, since a parent's threads do not survive a fork."""
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="reblock-read")


def candidates(runs: Sequence[Run], number: int, offset: int, uid: int) -> Iterator[tuple[int, int]]:
    """Yields (shard, row) of the visit's sample, then of its replacements; each sample of the runs comes once.

    The first replacements are random with a seed from the uid alone, so every rank and process draws the same. After
    `_MAX_DRAWS` draws, all other samples follow in order, from the last one drawn on.

    Args:
        runs: runs of one group.
        number: index in `runs` of the run that holds the visit's sample.
        offset: offset of the sample in that run.
        uid: number of the visit.
    """
    given = {(runs[number].shard, runs[number].first + offset)}
    yield from given
    ends = np.cumsum([run.size for run in runs])
    for drawn in np.random.default_rng([_REPLACEMENT, uid]).integers(ends[-1], size=_MAX_DRAWS).tolist():
        number = int(np.searchsorted(ends, drawn, side="right"))
        offset = drawn - int(ends[number]) + runs[number].size
        choice = runs[number].shard, runs[number].first + offset
        if choice not in given:
            given.add(choice)
            yield choice
    yield from (choice for choice in _wrapping(runs, number, offset) if choice not in given)


def _wrapping(runs: Sequence[Run], number: int, offset: int) -> Iterator[tuple[int, int]]:
    """Yields (shard, row) of all samples of the runs in order, from the given one to the last, then from the first."""
    for step in range(len(runs) + 1):
        shard, first, size = runs[(number + step) % len(runs)]
        begin = offset if step == 0 else 0
        end = offset if step == len(runs) else size
        for row in range(begin, end):
            yield shard, first + row
