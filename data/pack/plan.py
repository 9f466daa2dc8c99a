"""The second step of packing: which sample goes into which shard. Only the journal decides.

Samples are sorted by bucket and key, so the plan does not depend on the number of processes.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.bucket import Bucket
from data.shards.format import shard_name

_WINDOW_KEY = re.compile(r"--w\d{3,}$")
#: Estimated bytes: a member's header and the padding of its last block; the JSON without and per frame index.
_MEMBER_BYTES, _FACTS_BYTES, _INDEX_BYTES = 768, 256, 5


class PlannedSample(NamedTuple):
    """A sample to be packed. A tuple, because there may be millions.

    Args:
        key: its name in the shard.
        chunk: number of the journal's file that describes its clip.
        offset: of the clip's line in that file.
        window: number of the window of the clip.
        bytes: in the shard, estimated if only a part of the clip is stored.
    """

    key: str
    chunk: int
    offset: int
    window: int
    bytes: int


class Duplicate(NamedTuple):
    """A sample with the key or the content of an earlier one.

    Args:
        key: of the second.
        same_as: key of the first.
        kind: `key` or `content`.
        line: file and offset of the second clip's line in the journal.
        first_line: file and offset of the first clip's line.
    """

    key: str
    same_as: str
    kind: str
    line: tuple[int, int]
    first_line: tuple[int, int]


class _JournalledClip(NamedTuple):
    key: str
    chunk: int
    offset: int
    digest: bytes
    windows: tuple[tuple[int, int], ...]  # (number of the bucket, bytes)

    def duplicate(self, key: str, kind: str, first: "_JournalledClip", same_as: str) -> Duplicate:
        return Duplicate(key, same_as, kind, (self.chunk, self.offset), (first.chunk, first.offset))


@dataclass
class PackPlan:
    """What the shards will hold.

    Args:
        shards: name -> bucket, and samples in their order.
        duplicates: of keys and contents, in the order of the keys.
        digest: changes with any planned sample.
    """

    shards: dict[str, tuple[Bucket, Sequence[PlannedSample]]] = field(default_factory=dict)
    duplicates: list[Duplicate] = field(default_factory=list)
    digest: str = ""

    @property
    def samples(self) -> int:
        """Number of planned samples."""
        return sum(len(samples) for _, samples in self.shards.values())


def is_trimmed(indices: Sequence[int], frames: int) -> bool:
    """Whether only a window of a clip is stored: if it spans less than half of the clip's frames."""
    return 2 * (max(indices) - min(indices) + 1) < frames


def sample_bytes(row: Mapping[str, Any], indices: Sequence[int]) -> int:
    """Estimated bytes of a window in a shard."""
    clip, frames = row["bytes"], row["facts"]["frames"]
    if is_trimmed(indices, frames):
        clip = clip * (max(indices) - min(indices) + 1) // frames
    return clip + len(row["caption"].encode()) + 3 * _MEMBER_BYTES + _FACTS_BYTES + _INDEX_BYTES * len(indices)


def split_into_shards(sizes: Sequence[int], limit_bytes: int, limit_samples: int) -> Iterator[range]:
    """Splits a sequence of samples into shards of at most so many bytes and samples.

    A sample that is larger than `limit_bytes` gets a shard of its own.

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
) -> PackPlan:
    """Assigns samples to shards, by bucket and in the order of their keys.

    Of several clips with one key, the first of the source is packed. A clip of several windows gives the samples
    KEY--w000, KEY--w001, ...

    Args:
        rows: (file, offset, line) of the journal, in the order of the source.
        buckets: named in the lines.
        shard_bytes: target size of a shard.
        shard_samples: most samples of a shard.
        drop_duplicates: leave out clips with the bytes of another clip. All duplicates are reported in any case.
    """
    plan, digest = PackPlan(), hashlib.sha256()
    samples: list[list[PlannedSample]] = [[] for _ in buckets]
    clips = _journalled_clips(rows, buckets)
    # Only a key of this form can equal that of another clip's window.
    names = {clip.key: clip for clip in reversed(clips) if len(clip.windows) == 1 and _WINDOW_KEY.search(clip.key)}
    first_of: dict[bytes, _JournalledClip] = {}
    previous: _JournalledClip | None = None
    for clip in clips:
        if previous is not None and clip.key == previous.key:
            plan.duplicates.append(clip.duplicate(clip.key, "key", previous, clip.key))
            continue
        previous = clip
        original = first_of.setdefault(clip.digest, clip)
        if original is not clip:
            plan.duplicates.append(clip.duplicate(clip.key, "content", original, original.key))
            if drop_duplicates:
                continue
        digest.update(json.dumps([clip.key, clip.digest.hex(), clip.windows]).encode())
        for window, (bucket, size) in enumerate(clip.windows):
            key = clip.key if len(clip.windows) == 1 else f"{clip.key}--w{window:03d}"
            if len(clip.windows) > 1 and key in names:
                plan.duplicates.append(clip.duplicate(key, "key", names[key], key))
                continue
            samples[bucket].append(PlannedSample(key, clip.chunk, clip.offset, window, size))
    for bucket_of, planned in zip(buckets, samples, strict=True):
        planned.sort(key=lambda sample: sample.key)
        parts = split_into_shards([sample.bytes for sample in planned], shard_bytes, shard_samples)
        for index, part in enumerate(parts):
            plan.shards[shard_name(bucket_of, index)] = (bucket_of, planned[part.start : part.stop])
    plan.digest = digest.hexdigest()[:16]
    return plan


def _journalled_clips(
    rows: Iterable[tuple[int, int, Mapping[str, Any]]], buckets: Sequence[Bucket]
) -> list[_JournalledClip]:
    """The clips that have windows, in the order of their keys; of one key, in the order of the source."""
    number = {bucket.name: index for index, bucket in enumerate(buckets)}
    clips = [
        _JournalledClip(
            row["key"],
            chunk,
            offset,
            bytes.fromhex(row["sha256"]),
            tuple((number[name], sample_bytes(row, indices)) for name, indices in row["windows"]),
        )
        for chunk, offset, row in rows
        if "windows" in row
    ]
    return sorted(clips, key=lambda clip: (clip.key, clip.chunk, clip.offset))
