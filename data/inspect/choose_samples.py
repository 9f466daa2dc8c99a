"""Which samples of shards `reblock inspect` reads."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.shards.archive import Members
from data.shards.format import read_samples
from data.storage.store import Store, join
from data.stream.shard_index import IndexedShards


class SampleLocation(NamedTuple):
    """Where a sample is.

    Args:
        shard: path or URL.
        key: of the sample.
        members: of the sample in the shard.
    """

    shard: str
    key: str
    members: Members


def choose_samples(sources: Sequence[IndexedShards], store: Store, count: int) -> list[SampleLocation]:
    """About `count` samples at even distances; only the records of their shards are read."""
    entries = [(source.folder, entry) for source in sources for entry in source.index["shards"]]
    ends = np.cumsum([entry["samples"] for _, entry in entries])
    wanted = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).round().astype(int))
    shard_numbers = np.searchsorted(ends, wanted, side="right")
    chosen: list[SampleLocation] = []
    for number in np.unique(shard_numbers):
        folder, entry = entries[number]
        try:
            samples = read_samples(folder, entry["name"], store)
        except (ValueError, OSError):
            continue  # `verify` reports it
        first = int(ends[number]) - entry["samples"]
        positions = [int(w) - first for w in wanted[shard_numbers == number]]
        shard = join(folder, entry["name"])
        chosen += [SampleLocation(shard, *samples[position]) for position in positions if position < len(samples)]
    return chosen
