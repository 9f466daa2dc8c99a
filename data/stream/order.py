"""The order in which samples are visited, and each rank's share of it: resumable, and the same for any layout.

A split is numbered by position; visit p * size + i is position i in pass p. Samples of one shape form a group; every
global batch comes from one group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

#: Separates draws of the order of groups from those of samples, whose keys are small numbers.
_GROUPS = 0x67726F757073

Array = NDArray[np.int64]


@dataclass(frozen=True)
class BatchGroup:
    """Samples of a split that may share a batch.

    Args:
        name: of their bucket.
        starts: position in the split of each shard's first sample.
        sizes: samples of each shard, at least 1.
    """

    name: str
    starts: Array
    sizes: Array

    def __len__(self) -> int:
        return int(self.sizes.sum())


def epoch_order(
    seed: int,
    epoch: int,
    shard_sizes: Sequence[int] | Array,
    *,
    starts: Sequence[int] | Array | None = None,
    stride: int | None = None,
    passes: int = 1,
    window: int = 16,
    group: int = 0,
) -> Array:
    """The visits of one nominal epoch to some shards, each sample once per pass.

    Shards are shuffled, and samples inside windows of so many shards: archives are read nearly sequentially, which is
    fast on shared file systems. Each pass is shuffled by itself.

    Args:
        seed: of the shuffle.
        epoch: nominal epoch.
        shard_sizes: samples per shard, in the order of the data set.
        starts: position of each shard's first sample; by default they follow one another.
        stride: what a pass adds to a position; by default the number of samples.
        passes: how often a nominal epoch visits each sample.
        window: shards whose samples are shuffled together.
        group: number of the group; groups of equal sizes get different orders.

    Returns:
        (passes * samples,) visits.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    firsts = np.asarray(np.cumsum(sizes) - sizes if starts is None else starts, dtype=np.int64)
    stride = int(sizes.sum()) if stride is None else stride
    visits = []
    for number in range(passes):
        rng = np.random.default_rng([seed, epoch, number, *([group] if group else [])])
        shards = rng.permutation(len(sizes))
        for first in range(0, len(shards), window):
            chosen = shards[first : first + window]
            members = np.arange(sizes[chosen].sum()) + np.repeat(
                firsts[chosen] - (np.cumsum(sizes[chosen]) - sizes[chosen]), sizes[chosen]
            )
            visits.append(rng.permutation(members) + number * stride)
    return np.concatenate(visits) if visits else np.empty(0, dtype=np.int64)


def global_batches(
    seed: int, epoch: int, groups: Sequence[BatchGroup], size: int, *, passes: int = 1, window: int = 16
) -> Array:
    """The global batches of one nominal epoch, (batches, size) visits; a function of its arguments alone.

    Each group's visits, over all passes, are cut into batches. What is left at the end of a group's order and fills no
    batch is not visited in this epoch; which samples these are changes with the epoch. The batches of a group keep
    their order; from which group the next one comes is drawn, each group as often as it has batches.

    Args:
        seed: of the shuffle.
        epoch: nominal epoch.
        groups: of the split.
        size: samples of a global batch.
        passes: how often a nominal epoch visits each sample.
        window: shards of a group whose samples are shuffled together.

    Raises:
        ValueError: if no group fills a global batch.
    """
    counts = batch_counts(groups, size, passes)
    stride = sum(len(group) for group in groups)
    orders = (
        epoch_order(seed, epoch, g.sizes, starts=g.starts, stride=stride, passes=passes, window=window, group=number)
        for number, g in enumerate(groups)
    )
    if len(groups) == 1:
        return next(orders)[: counts[0] * size].reshape(-1, size)
    group_of_batch = np.random.default_rng([seed, epoch, _GROUPS]).permutation(
        np.repeat(np.arange(len(groups)), counts)
    )
    batches = np.empty((len(group_of_batch), size), dtype=np.int64)
    for number, order in enumerate(orders):
        batches[group_of_batch == number] = order[: counts[number] * size].reshape(-1, size)
    return batches


def batch_counts(groups: Sequence[BatchGroup], size: int, passes: int) -> list[int]:
    """Global batches of a nominal epoch that each group fills.

    Raises:
        ValueError: if no group fills one.
    """
    counts = [len(group) * passes // size for group in groups]
    if not any(counts):
        found = ", ".join(f"{group.name}: {len(group)}" for group in groups)
        raise ValueError(
            f"got {found or 'no'} samples (x {passes} passes) for a global batch of {size}, expected at least one full "
            "batch of one bucket; lower the batch size, or raise passes."
        )
    return counts


class ResumableBatchSampler(Sampler[list[int]]):
    """One rank's share of each global batch, from a given batch on: consecutive columns of its row.

    Args:
        batches: global batches of the epoch, (batches, size).
        rank: this rank.
        world_size: number of ranks.
        start_batch: global batches that were consumed already; they are never loaded.

    Raises:
        ValueError: if the ranks do not divide a global batch, or there is no such rank.
    """

    def __init__(self, batches: Array, rank: int = 0, world_size: int = 1, start_batch: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"got rank {rank} of {world_size}, expected 0 to {world_size - 1}.")
        self.batch_size = rank_size(batches.shape[1], world_size)
        self.batches = batches
        self.rank = rank
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches of the whole epoch, consumed ones included: Lightning counts from the epoch's start."""
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        first = self.rank * self.batch_size
        for number in range(self.start_batch, len(self)):
            yield self.batches[number, first : first + self.batch_size].tolist()


def rank_size(global_size: int, world_size: int) -> int:
    """Samples of a global batch that one rank takes.

    Raises:
        ValueError: if the ranks do not divide it; names the nearest sizes that they do.
    """
    if global_size % world_size:
        below = global_size - global_size % world_size
        nearest = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise ValueError(
            f"got global_batch_size {global_size} on {world_size} ranks, expected a multiple of the ranks: {nearest}."
        )
    return global_size // world_size


def evaluation_batches(groups: Sequence[BatchGroup], size: int, rank: int, world_size: int) -> list[list[int]]:
    """One rank's batches of a split that is seen once: positions, each batch of one group.

    Ranks get batches of equal number and size, or collectives would hang. Where the ranks do not divide a group, its
    first samples come again as visits of a second pass (`position + samples of the split`), which do not count.
    """
    total = sum(len(group) for group in groups)
    batches = []
    for group in groups:
        positions = np.arange(len(group)) + np.repeat(
            group.starts - (np.cumsum(group.sizes) - group.sizes), group.sizes
        )
        repeated = np.resize(positions, -len(positions) % world_size)
        own = np.concatenate([positions, repeated + total])[rank::world_size]
        batches += [own[first : first + size].tolist() for first in range(0, len(own), size)]
    return batches
