"""Which samples are trained on, and which are held out for validation."""

from collections.abc import Sequence

from data.stream.reader import ShardReader
from data.stream.split import Split


def everything(reader: ShardReader) -> Split:
    """All samples as one split."""
    return Split(reader, [0] * len(reader.shard_sizes), reader.shard_sizes)


def hold_out(reader: ShardReader, samples: int) -> tuple[Split, Split]:
    """Training samples, and the last ones of each group, as many as its share of the data set."""
    trained, held_out = _counts(reader, samples, last=True)
    train = Split(reader, [0] * len(trained), trained)
    return train, Split(reader, trained, held_out, first_uid=len(train), once=True)


def first_of(reader: ShardReader, samples: int) -> Split:
    """The first samples of each group, as many as its share of the data set."""
    _, taken = _counts(reader, min(samples, sum(reader.shard_sizes)), last=False)
    return Split(reader, [0] * len(taken), taken, once=True)


def _counts(reader: ShardReader, samples: int, *, last: bool) -> tuple[list[int], list[int]]:
    """Samples of each shard that are left and that are taken."""
    sizes = reader.shard_sizes
    members = [[s for s in range(len(sizes)) if reader.group(s) == name] for name in reader.group_names]
    quotas = shares([sum(sizes[s] for s in shards) for shards in members], samples)
    taken = [0] * len(sizes)
    for shards, quota in zip(members, quotas, strict=True):
        for shard in reversed(shards) if last else shards:
            taken[shard] = min(sizes[shard], quota)
            quota -= taken[shard]
    return [size - count for size, count in zip(sizes, taken, strict=True)], taken


def shares(counts: Sequence[int], total: int) -> list[int]:
    """`total` divided in proportion to `counts`: the largest remainders round up, and none gets more than it has.

    Where `total` is enough, each gets at least one if that leaves it one.
    """
    whole = sum(counts)
    ideal = [total * count / whole for count in counts]
    found = [int(share) for share in ideal]
    by_remainder = sorted(range(len(counts)), key=lambda i: (found[i] - ideal[i], i))
    for reserve in (1, 0):  # a group is emptied only where nothing else is left to take
        for i in by_remainder:
            if sum(found) < total and found[i] + reserve < counts[i] and found[i] < ideal[i]:
                found[i] += 1
    if total >= len(counts):
        for i, count in enumerate(counts):
            richest = max(range(len(counts)), key=lambda j: found[j])
            if found[i] == 0 and count > 1 and found[richest] > 1:
                found[richest] -= 1
                found[i] += 1
    return found


def check_disjoint(train: Split, held_out: Split) -> None:
    """Checks that no sample is in both parts, by the content of their shards.

    Raises:
        ValueError: naming a shard whose samples, or a copy's, are both trained on and held out.
    """
    found: dict[str, list[tuple[int, int, str]]] = {}
    for shard, first, count in train.runs():
        found.setdefault(train.reader.identity(shard), []).append((first, count, train.reader.shards[shard]))
    for shard, first, count in held_out.runs():
        for other_first, other_count, name in found.get(held_out.reader.identity(shard), []):
            if other_first < first + count and first < other_first + other_count:
                own_name = held_out.reader.shards[shard]
                copy = "" if own_name == name else f", whose copy is the training shard {name}"
                raise ValueError(
                    f"{own_name} holds samples for validation{copy}: they would be trained on as well. Take it out of "
                    "data.shards or data.val_shards, and name each copy once."
                )
