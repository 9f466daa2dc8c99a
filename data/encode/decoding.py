"""Clips of video shards, read and decoded ahead of the encoders, in processes that may hang or die.

Legend: B clips, T video frames, H W pixels.
"""

import contextlib
import functools
import os
import queue
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.bucket import Bucket
from data.shards.archive import Members
from data.shards.format import Fault, read_clip, read_json, read_member, read_samples
from data.storage.store import Store, StoreError, join
from data.video.decode import decode_video
from data.video.worker_pool import Failure, WorkerPool

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """A sample of a video shard that is still to be read and decoded."""

    shard: str  # location
    key: str
    members: Members
    bucket: Bucket
    store: Store


@dataclass(frozen=True)
class Clip:
    """What is known of a decoded sample besides its pixels."""

    key: str
    caption: str
    source: str
    indices: list[int]


@dataclass
class Work:
    """A shard that this process encodes.

    Args:
        name: of the shard, in the source and in the result.
        bucket: of all its samples.
        items: its samples in order, or why one cannot be read.
        texts: digest of a caption that was encoded -> whether its embedding is finite.
    """

    name: str
    bucket: Bucket
    items: list[Item | Fault]
    texts: dict[str, bool] = field(default_factory=dict)


@dataclass
class Batch:
    """Neighbours in a shard, decoded; which they are depends on their places alone.

    Args:
        work: their shard.
        found: the clips, and faults where one could not be decoded, in the order of the shard.
        pixels: (B, T, H, W, 3) uint8 of the clips; None if there is none.
        last: whether the shard ends with them.
    """

    work: Work
    found: list[Clip | Fault]
    pixels: Tensor | None
    last: bool

    @property
    def clips(self) -> list[Clip]:
        """Those that could be decoded."""
        return [clip for clip in self.found if isinstance(clip, Clip)]


def open_shard(folder: str, entry: Mapping[str, Any], store: Store) -> Work:
    """What there is to decode of a shard.

    A shard that is cut costs the samples behind the cut; one that is absent, whose store does not answer, or whose
    record cannot be read costs all of its samples.

    Args:
        folder: of the video shards, a path or URL.
        entry: of the shard in their index.
        store: that reads them.
    """
    name, bucket = entry["name"], Bucket.parse(entry["bucket"])
    location = join(folder, name)
    try:
        samples = read_samples(folder, name, store)
        if len(samples) != entry["samples"]:
            raise ValueError(f"its record lists {len(samples)} samples, the index {entry['samples']}")
    except (ValueError, OSError) as error:
        # Its keys are unknown; their number is not.
        keys = [f"#{number}" for number in range(entry["samples"])]
        return Work(name, bucket, [Fault(key, f"its shard cannot be read: {error}", name) for key in keys])
    try:
        # Asked once: each sample would be tried again and again with growing pauses.
        size, why = store.size(location), "its shard is absent"
    except StoreError as error:
        size, why = None, f"its shard cannot be read: {error}"
    items: list[Item | Fault] = []
    for key, members in samples:
        end = max(member.offset + member.size for member in members.values())
        if size is None:
            items.append(Fault(key, why, name))
        elif end > size:
            items.append(Fault(key, f"its shard is cut at byte {size}, it ends at {end}", name))
        else:
            items.append(Item(location, key, members, bucket, store))
    return Work(name, bucket, items)


@functools.cache
def _leave_cores() -> None:
    """Once per process: decoders leave the cores to the model where both need them."""
    with contextlib.suppress(OSError):
        os.nice(5)


def decode(item: Item | Fault) -> tuple[Clip, NDArray[np.uint8]] | Fault:
    """Reads and decodes one sample in a process of its own, pixels as (T, H, W, 3); faults pass through.

    Raises:
        ValueError: if a member is missing or wrong, or the clip cannot be decoded.
        OSError: if the shard cannot be read.
    """
    if isinstance(item, Fault):
        return item
    _leave_cores()
    bucket = item.bucket
    facts = read_json(item.shard, item.members, item.store)
    indices = facts.get("indices")
    if not isinstance(indices, list) or len(indices) != bucket.frames or not all(type(i) is int for i in indices):
        raise ValueError(f"its json has indices {indices!r:.80}, expected {bucket.frames} numbers of frames")
    if "txt" not in item.members:
        raise ValueError("it has no caption (a member .txt)")
    try:
        caption = read_member(item.shard, item.members["txt"], item.store).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"its caption is not UTF-8 ({error})") from error
    video = decode_video(read_clip(item.shard, item.members, item.store), indices, bucket.height, bucket.width)
    return Clip(item.key, caption, str(facts.get("source", item.key)), indices), video


def decoded(works: Iterable[Work], pool: WorkerPool, batch_size: int) -> Iterator[Batch]:
    """Batches of the shards one after another; the next shard's clips are decoded while this one's are waited for.

    Args:
        works: drawn as there is room for more decoded clips; one must not wait for what the caller has yet to do.
        pool: of decoders.
        batch_size: clips per batch; a shard's last batch may be smaller, and faults leave gaps.
    """
    plan: deque[tuple[Work, int, Item | Fault]] = deque()

    def items() -> Iterator[Item | Fault]:
        for work in works:
            for number, item in enumerate(work.items):
                plan.append((work, number, item))
                yield item

    found: list[Clip | Fault] = []
    videos: list[NDArray[np.uint8]] = []
    for result in pool.map(decode, items(), ahead=2 * batch_size):
        work, number, item = plan.popleft()
        if isinstance(result, Failure):
            result = Fault(item.key, result.reason, work.name)
        if isinstance(result, Fault):
            found.append(result)
        else:
            found.append(result[0])
            videos.append(result[1])
        last = number + 1 == len(work.items)
        if len(found) == batch_size or last:
            pixels = torch.from_numpy(np.stack(videos)) if videos else None
            yield Batch(work, found, pixels, last)
            found, videos = [], []


def ahead(source: Iterator[T], depth: int) -> Generator[T, None, None]:
    """The same values, drawn in a thread up to `depth` ahead of the caller; errors come through.

    The thread starts with the call. Closing the result stops it, which closes the source.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(message: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(message, timeout=0.1)
                return True
        return False

    def draw() -> None:
        try:
            with contextlib.closing(source):  # type: ignore[type-var]
                for value in source:
                    if not put((True, value)):
                        return
            put((False, None))
        except BaseException as error:  # handed on, whatever it is
            put((False, error))

    thread = threading.Thread(target=draw, name="ahead", daemon=True)
    thread.start()

    def drawn() -> Generator[T, None, None]:
        try:
            while True:
                more, value = ready.get()
                if more:
                    yield value
                elif value is not None:
                    raise value
                else:
                    return
        finally:
            stop.set()
            # It may wait for a clip that hangs; what it waits for ends with the pool of decoders.
            thread.join(timeout=1.0)

    return drawn()
