"""The second step of packing: which sample goes into which shard. Nothing but the journal of the survey decides."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.bucket import Bucket
from data.shards.format import shard_name

_WINDOW_NAME = re.compile(r"--w\d{3,}$")
#: Of an archive's member: its header and, on average, what fills its last block; and the facts with their indices.
_MEMBER_BYTES, _FACTS_BYTES, _INDEX_BYTES = 768, 256, 5


class Sample(NamedTuple):
    """A sample to be packed: slim, since there may be millions.

    Args:
        key: its name in the shard.
        chunk: file of the journal that has its clip.
        offset: of the clip's line in it.
        window: which of the clip's windows it is.
        bytes: that it takes in a shard; an estimate where less than the clip is kept.
    """

    key: str
    chunk: int
    offset: int
    window: int
    bytes: int


class Duplicate(NamedTuple):
    """A sample that is there twice.

    Args:
        key: of the second.
        same_as: key of the first.
        kind: what they have in common, `key` or `content`.
        place: file and offset of the second's line in the journal.
        first: likewise of the first.
    """

    key: str
    same_as: str
    kind: str
    place: tuple[int, int]
    first: tuple[int, int]


class _Clip(NamedTuple):
    key: str
    chunk: int
    offset: int
    digest: bytes
    windows: tuple[tuple[int, int], ...]  # (bucket, bytes)

    def twice(self, key: str, kind: str, first: "_Clip", same_as: str) -> Duplicate:
        return Duplicate(key, same_as, kind, (self.chunk, self.offset), (first.chunk, first.offset))


@dataclass
class Plan:
    """What the shards will hold.

    Args:
        shards: name -> bucket and samples in their order.
        duplicates: keys and contents that are there twice, in the order of the keys.
        digest: changes with any sample that is planned.
    """

    shards: dict[str, tuple[Bucket, Sequence[Sample]]] = field(default_factory=dict)
    duplicates: list[Duplicate] = field(default_factory=list)
    digest: str = ""

    @property
    def samples(self) -> int:
        """How many samples are planned."""
        return sum(len(samples) for _, samples in self.shards.values())


def is_part(indices: Sequence[int], frames: int) -> bool:
    """Whether a window uses so little of a clip that it is cut out of it: less than half of its frames."""
    return 2 * (max(indices) - min(indices) + 1) < frames


def sample_bytes(row: Mapping[str, Any], indices: Sequence[int]) -> int:
    """Bytes that a window of a clip takes in a shard."""
    clip, frames = row["bytes"], row["facts"]["frames"]
    if is_part(indices, frames):
        clip = clip * (max(indices) - min(indices) + 1) // frames
    return clip + len(row["caption"].encode()) + 3 * _MEMBER_BYTES + _FACTS_BYTES + _INDEX_BYTES * len(indices)


def cut(sizes: Sequence[int], limit_bytes: int, limit_samples: int) -> Iterator[range]:
    """Cuts samples, one after another, into shards of at most so many bytes and samples.

    A sample that is larger than a shard gets one of its own.

    Args:
        sizes: bytes of each sample.
        limit_bytes: of a shard.
        limit_samples: of a shard.
    """
    start = total = 0
    for index, size in enumerate(sizes):
        if index > start and (total + size > limit_bytes or index - start == limit_samples):
            yield range(start, index)
            start, total = index, 0
        total += size
    if start < len(sizes):
        yield range(start, len(sizes))


def make_plan(
    rows: Iterable[tuple[int, int, Mapping[str, Any]]],
    buckets: Sequence[Bucket],
    *,
    shard_bytes: int,
    shard_samples: int,
    drop_duplicates: bool = False,
) -> Plan:
    """Assigns samples to shards, by bucket and in the order of their keys.

    Of clips with one key, the first of the source is taken. A clip of several windows gives the samples KEY--w000,
    KEY--w001, ...

    Args:
        rows: (file, offset, line) of a survey's journal, in the order of the source.
        buckets: that the lines name.
        shard_bytes: target size of a shard.
        shard_samples: most samples of a shard.
        drop_duplicates: leave out clips whose bytes are those of another one; all are reported.
    """
    number = {bucket.name: index for index, bucket in enumerate(buckets)}
    clips = [
        _Clip(
            row["key"],
            chunk,
            offset,
            bytes.fromhex(row["sha256"]),
            tuple((number[name], sample_bytes(row, indices)) for name, indices in row["windows"]),
        )
        for chunk, offset, row in rows
        if "windows" in row
    ]
    clips.sort(key=lambda clip: (clip.key, clip.chunk, clip.offset))
    plan = Plan()
    samples: list[list[Sample]] = [[] for _ in buckets]
    first_of: dict[bytes, _Clip] = {}
    taken: _Clip | None = None
    digest = hashlib.sha256()
    # Only such a name can be that of another clip's window.
    names = {clip.key: clip for clip in reversed(clips) if len(clip.windows) == 1 and _WINDOW_NAME.search(clip.key)}
    for clip in clips:
        if taken is not None and clip.key == taken.key:
            plan.duplicates.append(clip.twice(clip.key, "key", taken, clip.key))
            continue
        taken = clip
        original = first_of.setdefault(clip.digest, clip)
        if original is not clip:
            plan.duplicates.append(clip.twice(clip.key, "content", original, original.key))
            if drop_duplicates:
                continue
        digest.update(json.dumps([clip.key, clip.digest.hex(), clip.windows]).encode())
        for window, (bucket, size) in enumerate(clip.windows):
            key = clip.key if len(clip.windows) == 1 else f"{clip.key}--w{window:03d}"
            if len(clip.windows) > 1 and key in names:
                plan.duplicates.append(clip.twice(key, "key", names[key], key))
                continue
            samples[bucket].append(Sample(key, clip.chunk, clip.offset, window, size))
    for bucket_of, planned in zip(buckets, samples, strict=True):
        planned.sort(key=lambda sample: sample.key)
        for index, part in enumerate(cut([sample.bytes for sample in planned], shard_bytes, shard_samples)):
            plan.shards[shard_name(bucket_of, index)] = (bucket_of, planned[part.start : part.stop])
    plan.digest = digest.hexdigest()[:16]
    return plan
