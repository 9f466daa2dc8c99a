"""Batches of decoded clips from video shards. Worker processes decode the clips ahead of the encoders.

Legend: B clips, T video frames, H W pixels.
"""

import contextlib
import functools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.bucket import Bucket
from data.families import MOCHI
from data.shards.archive import Members
from data.shards.format import Fault, read_clip, read_json, read_member, read_samples
from data.storage.store import Store, StoreError, join
from data.video.decode import decode_video
from data.video.worker_pool import Failure, WorkerPool


@dataclass(frozen=True)
class DecodeTask:
    """A sample of a video shard that is still to be read and decoded."""

    shard: str  # location
    key: str
    members: Members
    bucket: Bucket
    store: Store


@dataclass(frozen=True)
class DecodedClip:
    """A decoded sample without its pixels."""

    key: str
    caption: str
    source: str
    indices: list[int]


@dataclass
class ShardTask:
    """A shard that this process encodes.

    Args:
        name: of the video shard and of the latent shard.
        bucket: of all its samples.
        samples: in order; a fault in place of a sample that cannot be read.
        captions: digest of each caption that was encoded -> whether its embedding is finite.
    """

    name: str
    bucket: Bucket
    samples: list[DecodeTask | Fault]
    captions: dict[str, bool] = field(default_factory=dict)


@dataclass
class DecodedBatch:
    """Consecutive samples of a shard, decoded. Their order in the shard alone decides which samples form a batch.

    Args:
        shard: that they belong to.
        results: the clips, and faults in place of samples that could not be decoded, in the order of the shard.
        pixels: (B, T, H, W, 3) uint8 of the clips; None if there is no clip.
        last: whether it is the shard's last batch.
    """

    shard: ShardTask
    results: list[DecodedClip | Fault]
    pixels: Tensor | None
    last: bool

    @property
    def clips(self) -> list[DecodedClip]:
        """The samples that could be decoded."""
        return [clip for clip in self.results if isinstance(clip, DecodedClip)]


def open_shard(folder: str, entry: Mapping[str, Any], store: Store, family: str = MOCHI.name) -> ShardTask:
    """The samples of a shard, from its record.

    If a shard is cut short, the samples behind the cut are faults. If it is absent, its store fails, or its record
    cannot be read, all of its samples are.

    Args:
        folder: of the video shards, a path or URL.
        entry: of the shard in their index.
        store: reads the shards.
        family: that the clips are encoded for.
    """
    name, bucket = entry["name"], Bucket.parse(entry["bucket"], family)
    location = join(folder, name)
    try:
        samples = read_samples(folder, name, store)
        if len(samples) != entry["samples"]:
            raise ValueError(f"its record lists {len(samples)} samples, the index {entry['samples']}")
    except (ValueError, OSError) as error:
        # The keys are unknown, their number is not.
        keys = [f"#{number}" for number in range(entry["samples"])]
        return ShardTask(name, bucket, [Fault(key, f"its shard cannot be read: {error}", name) for key in keys])
    try:
        # One request for the shard: each sample would otherwise retry with growing pauses.
        size, reason = store.size(location), "its shard is absent"
    except StoreError as error:
        size, reason = None, f"its shard cannot be read: {error}"
    tasks: list[DecodeTask | Fault] = []
    for key, members in samples:
        end = max(member.offset + member.size for member in members.values())
        if size is None:
            tasks.append(Fault(key, reason, name))
        elif end > size:
            tasks.append(Fault(key, f"its shard is cut at byte {size}, it ends at {end}", name))
        else:
            tasks.append(DecodeTask(location, key, members, bucket, store))
    return ShardTask(name, bucket, tasks)


@functools.cache
def _lower_priority() -> None:
    """Once per process: the model gets the cores first where it needs them too."""
    with contextlib.suppress(OSError):
        os.nice(5)


def decode_sample(task: DecodeTask | Fault) -> tuple[DecodedClip, NDArray[np.uint8]] | Fault:
    """Reads and decodes one sample in a worker process, pixels as (T, H, W, 3); returns a fault unchanged.

    Raises:
        ValueError: if a member is missing or wrong, or the clip cannot be decoded.
        OSError: if the shard cannot be read.
    """
    if isinstance(task, Fault):
        return task
    _lower_priority()
    bucket = task.bucket
    facts = read_json(task.shard, task.members, task.store)
    indices = facts.get("indices")
    if not isinstance(indices, list) or len(indices) != bucket.frames or not all(type(i) is int for i in indices):
        raise ValueError(f"its json has indices {indices!r:.80}, expected {bucket.frames} numbers of frames")
    if "txt" not in task.members:
        raise ValueError("it has no caption (a member .txt)")
    try:
        caption = read_member(task.shard, task.members["txt"], task.store).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption is not UTF-8 ({error})") from error
    video = decode_video(read_clip(task.shard, task.members, task.store), indices, bucket.height, bucket.width)
    return DecodedClip(task.key, caption, str(facts.get("source", task.key)), indices), video


def decode_batches(shards: Iterable[ShardTask], pool: WorkerPool, batch_size: int) -> Iterator[DecodedBatch]:
    """Batches of the shards, one shard after another; the pool decodes the next shard's clips meanwhile.

    Args:
        shards: iterated by another thread; an iterator that waits for the caller would block forever.
        pool: decodes the clips.
        batch_size: samples per batch, faults included; a shard's last batch may be smaller.
    """
    in_order: deque[tuple[ShardTask, int, DecodeTask | Fault]] = deque()

    def tasks() -> Iterator[DecodeTask | Fault]:
        for shard in shards:
            for number, task in enumerate(shard.samples):
                in_order.append((shard, number, task))
                yield task

    results: list[DecodedClip | Fault] = []
    videos: list[NDArray[np.uint8]] = []
    for result in pool.map(decode_sample, tasks(), ahead=2 * batch_size):
        shard, number, task = in_order.popleft()
        if isinstance(result, Failure):
            result = Fault(task.key, result.reason, shard.name)
        if isinstance(result, Fault):
            results.append(result)
        else:
            results.append(result[0])
            videos.append(result[1])
        last = number + 1 == len(shard.samples)
        if len(results) == batch_size or last:
            pixels = torch.from_numpy(np.stack(videos)) if videos else None
            yield DecodedBatch(shard, results, pixels, last)
            results, videos = [], []
