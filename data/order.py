"""In which order samples are visited, and which of them each rank takes: exact, resumable, the same for any layout."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


def epoch_order(
    seed: int, epoch: int, shard_sizes: Sequence[int], *, passes: int = 1, window: int = 16
) -> NDArray[np.int64]:
    """The visits of one nominal epoch: a permutation of range(passes * sum(shard_sizes)).

    Shards are shuffled, and samples inside windows of so many shards: archives are read nearly one after another, as
    shared file systems like it. Each pass is shuffled by itself; visit p * size + i is sample i in pass p.

    Args:
        seed: of the shuffle.
        epoch: nominal epoch.
        shard_sizes: samples per shard, in the order of the data set.
        passes: how often a nominal epoch visits each sample.
        window: shards that are mixed with each other.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total = int(starts[-1])
    visits = []
    for number in range(passes):
        rng = np.random.default_rng([seed, epoch, number])
        shards = rng.permutation(len(sizes))
        for first in range(0, len(shards), window):
            members = [np.arange(starts[s], starts[s + 1]) for s in shards[first : first + window]]
            visits.append(rng.permutation(np.concatenate(members)) + number * total)
    return np.concatenate(visits) if visits else np.empty(0, dtype=np.int64)


class ResumableBatchSampler(Sampler[list[int]]):
    """One rank's share of each global batch, from a given batch on.

    Global batch g is `order[g * B * world : (g + 1) * B * world]`, whatever the number of ranks and workers, as long
    as B * world stays; rank r takes its r-th piece of B. What is left at the end of the epoch and fills no global
    batch is dropped, so that every rank has the same number of batches.

    Args:
        order: visits of the epoch.
        batch_size: B, samples per rank and batch.
        rank: this rank.
        world_size: number of ranks.
        start_batch: global batches that were consumed already; they are never loaded.

    Raises:
        ValueError: if the order does not fill one global batch.
    """

    def __init__(
        self,
        order: NDArray[np.int64],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        start_batch: int = 0,
    ) -> None:
        if batch_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"got batch_size {batch_size}, rank {rank} of {world_size}; expected 1 or more of each.")
        self.global_size = batch_size * world_size
        if len(order) < self.global_size:
            raise ValueError(
                f"got {len(order)} samples for a global batch of {batch_size} x {world_size} ranks = "
                f"{self.global_size}, expected at least one full batch; lower batch_size, or raise passes."
            )
        self.order = order
        self.batch_size = batch_size
        self.rank = rank
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches of the whole epoch, consumed ones included: Lightning counts from the epoch's start."""
        return len(self.order) // self.global_size

    def __iter__(self) -> Iterator[list[int]]:
        for number in range(self.start_batch, len(self)):
            start = number * self.global_size + self.rank * self.batch_size
            yield self.order[start : start + self.batch_size].tolist()


def evaluation_indices(count: int, rank: int, world_size: int) -> list[int]:
    """Every world_size-th of range(count), from `rank` on.

    Ranks get equally many, or collectives would hang: where `count` does not divide, the first samples are seen twice.
    """
    per_rank = -(-count // world_size)
    return [(rank + i * world_size) % count for i in range(per_rank)]
