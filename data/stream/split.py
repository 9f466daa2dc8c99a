"""Parts of a data set: which samples are held out, how a visit finds its sample, what replaces a damaged one."""

import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from data.stream.order import Group
from data.stream.reader import ShardDataset, candidates


class Split(Dataset):
    """Part of a data set: of each shard, a run of its samples.

    Positions follow the shards. Visit i is the sample at position i % size, and its uid is `start` + i, so that several
    passes over the data differ in what is keyed by it. A damaged sample is replaced, under the same uid, by one of its
    group that is drawn by that uid: the visits of a lost shard spread over the group, the same ones on any number of
    ranks and processes. It is never one of another split.

    Args:
        dataset: the whole.
        firsts: of each shard, its first sample that belongs to this part.
        counts: of each shard, how many do.
        start: uid of the first visit.
        once: each sample counts once: visits of a second pass are marked as not counting.
    """

    def __init__(
        self, dataset: ShardDataset, firsts: Sequence[int], counts: Sequence[int], *, start: int = 0, once: bool = False
    ) -> None:
        self.dataset = dataset
        self.start = start
        self._firsts, self._counts, self._once = list(firsts), list(counts), once
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64).tolist()
        members: dict[str, list[int]] = {name: [] for name in dataset.group_names}
        for shard, count in enumerate(counts):
            if count:
                members[dataset.group(shard)].append(shard)
        self._members = {name: shards for name, shards in members.items() if shards}
        self._runs = {n: [(s, firsts[s], counts[s]) for s in shards] for n, shards in self._members.items()}
        self._turn = {shard: turn for shards in self._members.values() for turn, shard in enumerate(shards)}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def groups(self) -> list[Group]:
        """Samples of one shape, in the order of their buckets."""
        starts, sizes = np.array(self._starts[:-1], dtype=np.int64), np.array(self._counts, dtype=np.int64)
        return [Group(name, starts[shards], sizes[shards]) for name, shards in self._members.items()]

    def __getitem__(self, visit: int) -> Any:
        if not len(self):
            raise IndexError("the split is empty")
        position = visit % len(self)
        shard = bisect.bisect_right(self._starts, position) - 1
        place = position - self._starts[shard]
        counts = not self._once or visit < len(self)
        runs = self._runs[self.dataset.group(shard)]
        uid = self.start + visit
        choices = candidates(runs, self._turn[shard], place, uid)
        return self.dataset.first_readable(choices, uid=uid, counts=counts)

    def __getitems__(self, visits: list[int]) -> list[Any]:
        """A batch; from a remote store, its samples are read at the same time."""
        return self.dataset.map(self.__getitem__, visits)

    def runs(self) -> list[tuple[int, int, int]]:
        """(shard, first sample, samples) of each shard that this part has samples of."""
        return [run for runs in self._runs.values() for run in runs]


def check_apart(train: Split, held: Split) -> None:
    """Whether no sample is in both parts, by the content of their shards.

    Raises:
        ValueError: naming a shard whose samples, or a copy's, are both trained on and held out.
    """
    found: dict[str, list[tuple[int, int, str]]] = {}
    for shard, first, count in train.runs():
        found.setdefault(train.dataset.identity(shard), []).append((first, count, train.dataset.shards[shard]))
    for shard, first, count in held.runs():
        for begin, size, name in found.get(held.dataset.identity(shard), []):
            if begin < first + count and first < begin + size:
                mine = held.dataset.shards[shard]
                copy = "" if mine == name else f", whose copy is the training shard {name}"
                raise ValueError(
                    f"{mine} holds samples for validation{copy}: they would be trained on as well. Take it out of "
                    "data.shards or data.val_shards, and name each copy once."
                )


def shares(counts: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to `counts`: the largest remainders round up, and none gets more than it has.

    Where `total` is enough, each gets at least one if that leaves it one.
    """
    whole = sum(counts)
    ideal = [total * count / whole for count in counts]
    found = [int(share) for share in ideal]
    by_remainder = sorted(range(len(counts)), key=lambda i: (found[i] - ideal[i], i))
    for leave in (1, 0):  # a group is emptied only where nothing else is left to take
        for i in by_remainder:
            if sum(found) < total and found[i] + leave < counts[i] and found[i] < ideal[i]:
                found[i] += 1
    if total >= len(counts):
        for i, count in enumerate(counts):
            richest = max(range(len(counts)), key=lambda j: found[j])
            if found[i] == 0 and count > 1 and found[richest] > 1:
                found[richest] -= 1
                found[i] += 1
    return found


def everything(dataset: ShardDataset) -> Split:
    """A whole data set as one split."""
    return Split(dataset, [0] * len(dataset.shard_sizes), dataset.shard_sizes)


def hold_out(dataset: ShardDataset, samples: int) -> tuple[Split, Split]:
    """Training samples, and the last ones of each group, as many as its share of the data set."""
    kept, held = _counts(dataset, samples, last=True)
    train = Split(dataset, [0] * len(kept), kept)
    return train, Split(dataset, kept, held, start=len(train), once=True)


def first_of(dataset: ShardDataset, samples: int) -> Split:
    """The first samples of each group, as many as its share of the data set."""
    _, taken = _counts(dataset, min(samples, sum(dataset.shard_sizes)), last=False)
    return Split(dataset, [0] * len(taken), taken, once=True)


def _counts(dataset: ShardDataset, samples: int, *, last: bool) -> tuple[list[int], list[int]]:
    """Samples of each shard that are left and that are taken."""
    sizes = dataset.shard_sizes
    names = dataset.group_names
    members = [[s for s in range(len(sizes)) if dataset.group(s) == name] for name in names]
    quotas = shares([sum(sizes[s] for s in shards) for shards in members], samples)
    taken = [0] * len(sizes)
    for shards, quota in zip(members, quotas, strict=True):
        for shard in reversed(shards) if last else shards:
            taken[shard] = min(sizes[shard], quota)
            quota -= taken[shard]
    return [size - taken_ for size, taken_ in zip(sizes, taken, strict=True)], taken
