"""Divides the samples into those for training and those held out for validation."""

from collections.abc import Sequence

from data.stream.reader import ShardReader
from data.stream.split import Split


def everything(reader: ShardReader) -> Split:
    """All samples as one split."""
    return Split(reader, [0] * len(reader.shard_sizes), reader.shard_sizes)


def hold_out(reader: ShardReader, samples: int) -> tuple[Split, Split]:
    """The training samples, and `samples` held-out ones: the last of each group, in proportion to its size."""
    trained, held_out = _counts(reader, samples, last=True)
    train = Split(reader, [0] * len(trained), trained)
    return train, Split(reader, trained, held_out, first_uid=len(train), once=True)


def first_of(reader: ShardReader, samples: int) -> Split:
    """At most `samples` samples: the first of each group, in proportion to its size."""
    _, taken = _counts(reader, min(samples, sum(reader.shard_sizes)), last=False)
    return Split(reader, [0] * len(taken), taken, once=True)


def _counts(reader: ShardReader, samples: int, *, last: bool) -> tuple[list[int], list[int]]:
    """Number of samples that remain in each shard, and number of samples taken from it."""
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
    """Divides `total` in proportion to `counts`; the largest remainders round up, and no share exceeds its count.

    If `total` is at least the number of groups, each group with two or more samples gets a share of at least one.
    """
    whole = sum(counts)
    ideal = [total * count / whole for count in counts]
    found = [int(share) for share in ideal]
    by_remainder = sorted(range(len(counts)), key=lambda i: (found[i] - ideal[i], i))
    for reserve in (1, 0):  # takes a group's last sample only if no other group can give one
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
    """Checks that no sample is in both parts; compares shards by content, so copies are found too.

    Raises:
        ValueError: if a shard has samples in both parts; names the shard.
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
