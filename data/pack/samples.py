"""Makes the samples of a shard: reads their clips again, and cuts out the windows that are packed."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.bucket import Bucket
from data.pack.journal import ClipJournal
from data.pack.plan import PlannedSample, is_trimmed
from data.pack.probe_clip import clip_content, clip_facts
from data.shards.format import Fault
from data.storage.store import Store
from data.video.decode import decode_video
from data.video.probe import probe_video
from data.video.trim import clip_suffix, trim_video
from data.video.worker_pool import Failure, WorkerPool
from data.video.write import write_video

_CHANGED = "it is not the clip that was surveyed: it changed since; choose another folder to pack it as it is now"


@dataclass(frozen=True)
class WindowTask:
    """A window that is to be cut out of a clip.

    Args:
        line: of the clip in the journal.
        bucket: of the window.
        indices: of its frames.
    """

    line: Mapping[str, Any]
    bucket: Bucket
    indices: Sequence[int]


@dataclass(frozen=True)
class PackedClip:
    """A video file as it is packed.

    Args:
        content: of the file.
        extension: of its name.
        facts: of it.
        indices: of the window's frames in it.
    """

    content: bytes
    extension: str
    facts: Mapping[str, Any]
    indices: Sequence[int]


def read_unchanged(line: Mapping[str, Any], store: Store) -> bytes:
    """The bytes of a clip in the journal.

    Raises:
        ValueError: if they have changed since the clip was probed.
        OSError: if they cannot be read.
    """
    content = clip_content(line).read(store)
    if hashlib.sha256(content).hexdigest() != line["sha256"]:
        raise ValueError(_CHANGED)
    return content


def cut_window(task: WindowTask, store: Store, fps: float | None, reencode: bool) -> PackedClip:
    """Cuts a window out of its clip: copies its packets, or encodes its frames at the bucket's size.

    If the packets cannot be copied exactly, the result is the whole clip.

    Args:
        task: the window.
        store: reads the clip.
        fps: of the window; None for the clip's own.
        reencode: whether to encode the frames.

    Raises:
        ValueError: if the clip cannot be read, or has changed since it was probed.
        OSError: if the clip's bytes cannot be read.
    """
    line, indices = task.line, task.indices
    path = clip_content(line).path
    # Of a long local file only the window is read, so its size is compared instead of its checksum.
    if path is not None and path.stat().st_size != line["bytes"]:
        raise ValueError(_CHANGED)
    source = path or read_unchanged(line, store)
    if reencode:
        frames = decode_video(source, indices, task.bucket.height, task.bucket.width)
        with tempfile.TemporaryDirectory(prefix="reblock-") as folder:
            target = Path(folder) / "clip.mp4"
            write_video(target, frames, fps or line["facts"]["fps"])
            content = target.read_bytes()
        return PackedClip(content, "mp4", clip_facts(probe_video(content)), range(len(indices)))
    try:
        content, first = trim_video(source, min(indices), max(indices))
    except ValueError:
        return PackedClip(read_unchanged(line, store), line["extension"], line["facts"], indices)
    shifted = [index - min(indices) + first for index in indices]
    return PackedClip(content, clip_suffix(content), clip_facts(probe_video(content)), shifted)


class SampleMaker:
    """Makes the samples of shards. Not thread-safe.

    Args:
        journal: that the planned samples refer to.
        store: reads the clips.
        pool: cuts the windows.
        fps: of the windows; None for each clip's own.
        reencode: whether to encode frames.
    """

    def __init__(self, journal: ClipJournal, store: Store, pool: WorkerPool, fps: float | None, reencode: bool) -> None:
        self._journal, self._store, self._pool = journal, store, pool
        self._cut_window = partial(cut_window, store=store, fps=fps, reencode=reencode)
        self._reencode = reencode

    def samples(
        self, bucket: Bucket, planned: Sequence[PlannedSample], faults: list[Fault]
    ) -> Iterator[dict[str, bytes | str] | None]:
        """Samples of a shard in their order; None in place of one that cannot be made.

        Args:
            bucket: of the shard.
            planned: the shard's samples.
            faults: this method appends the reason for each None.
        """
        # The pool reads ahead of this loop, in the same order. It starts with the first window that has to be cut.
        windows = self._pool.map(self._cut_window, self._cut_tasks(bucket, planned), ahead=2)
        for sample in planned:
            task = self._task(bucket, sample)
            result = next(windows) if self._is_cut(task) else self._read_whole_clip(task)
            if isinstance(result, Failure):
                faults.append(Fault(sample.key, result.reason, task.line["shard"]))
                yield None
                continue
            facts = {
                "source": task.line["source"],
                "sha256": hashlib.sha256(result.content).hexdigest(),
                **result.facts,
                "indices": list(result.indices),
                "bucket": bucket.name,
            }
            yield {
                "__key__": sample.key,
                result.extension: result.content,
                "txt": task.line["caption"],
                "json": json.dumps(facts, ensure_ascii=False),
            }

    def _cut_tasks(self, bucket: Bucket, planned: Sequence[PlannedSample]) -> Iterator[WindowTask]:
        """The windows that have to be cut. A generator of its own, because the pool's thread iterates over it."""
        for sample in planned:
            task = self._task(bucket, sample)
            if self._is_cut(task):
                yield task

    def _task(self, bucket: Bucket, sample: PlannedSample) -> WindowTask:
        line = self._journal.line(sample.chunk, sample.offset)
        return WindowTask(line, bucket, line["windows"][sample.window][1])

    def _is_cut(self, task: WindowTask) -> bool:
        return self._reencode or is_trimmed(task.indices, task.line["facts"]["frames"])

    def _read_whole_clip(self, task: WindowTask) -> PackedClip | Failure:
        line = task.line
        try:
            return PackedClip(read_unchanged(line, self._store), line["extension"], line["facts"], task.indices)
        except (ValueError, OSError) as error:
            return Failure(str(error))
