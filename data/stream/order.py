"""The order in which samples are visited, and each rank's share of it.

The order can be resumed, and does not depend on the number of ranks or workers. Visit p * size + i of a split is its
sample at position i in pass p. Samples of one shape form a group; every global batch comes from one group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

#: Part of the seed for the order of groups. Seeds for the order of samples hold small numbers only.
_GROUPS = 0x67726F757073

Array = NDArray[np.int64]


@dataclass(frozen=True)
class BatchGroup:
    """Samples of a split that may share a batch.

    Args:
        name: name of their bucket.
        starts: position in the split of each shard's first sample, (shards,).
        sizes: number of samples in each shard, at least 1, (shards,).
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
    """The visits of one nominal epoch to the given shards, each sample once per pass.

    Each pass shuffles the shards, and then the samples within each window of consecutive shards. So archives are read
    nearly sequentially, which is fast on shared file systems.

    Args:
        seed: seed of the shuffle.
        epoch: number of the nominal epoch.
        shard_sizes: samples per shard, in the order of the data set.
        starts: position of each shard's first sample; by default the shards follow one another.
        stride: difference between a sample's visit numbers in consecutive passes; by default the number of samples.
        passes: number of visits to each sample in a nominal epoch.
        window: number of shards whose samples are shuffled together.
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

    Each group's visits, over all passes, are cut into batches. Visits at the end that do not fill a batch are dropped;
    they concern other samples in each epoch. The batches of all groups are interleaved at random; those of one group
    keep their order.

    Args:
        seed: seed of the shuffle.
        epoch: number of the nominal epoch.
        groups: groups of the split.
        size: number of samples in a global batch.
        passes: number of visits to each sample in a nominal epoch.
        window: number of shards of a group whose samples are shuffled together.

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
    """Number of global batches that each group fills in a nominal epoch.

    Raises:
        ValueError: if no group fills a global batch.
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
    """Yields one rank's share of each global batch, consecutive columns of its row, starting at a given batch.

    Args:
        batches: global batches of the epoch, (batches, size) visits.
        rank: number of this rank.
        world_size: number of ranks.
        start_batch: number of global batches to skip because the run has consumed them; they are never loaded.

    Raises:
        ValueError: if the number of ranks does not divide the size, or `rank` is out of range.
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
    """Number of samples of a global batch that one rank takes.

    Raises:
        ValueError: if the number of ranks does not divide the size; names the nearest multiples.
    """
    if global_size % world_size:
        below = global_size - global_size % world_size
        nearest = " or ".join(str(size) for size in (below, below + world_size) if size)
        raise ValueError(
            f"got global_batch_size {global_size} on {world_size} ranks, expected a multiple of the ranks: {nearest}."
        )
    return global_size // world_size


def evaluation_batches(groups: Sequence[BatchGroup], size: int, rank: int, world_size: int) -> list[list[int]]:
    """One rank's batches of a split that is visited once, as positions; each batch comes from one group.

    All ranks get the same number of batches of the same sizes, or collectives would hang. A group is padded to a
    multiple of the ranks with repeated samples: visits of a second pass (`position + len(split)`), which do not count.
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
