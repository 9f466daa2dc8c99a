"""The third step of packing: reads the clips of a shard again, and cuts out of them what is used."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data.bucket import Bucket
from data.pack.plan import Sample, is_part
from data.pack.survey import Survey, clip_facts, piece
from data.shards.format import Fault
from data.storage.store import Store
from data.video.decode import decode_video
from data.video.probe import probe_video
from data.video.trim import clip_suffix, trim_video
from data.video.worker_pool import Failure, WorkerPool
from data.video.write import write_video

_CHANGED = "it is not the clip that was surveyed: it changed since; choose another folder to pack it as it is now"


@dataclass(frozen=True)
class Job:
    """A window that is to be cut out of a clip.

    Args:
        row: the clip's line in the journal.
        bucket: of the window.
        indices: of its frames.
    """

    row: Mapping[str, Any]
    bucket: Bucket
    indices: Sequence[int]


@dataclass(frozen=True)
class Cut:
    """A window as a clip of its own.

    Args:
        content: of the video file.
        extension: of its name.
        facts: of it.
        indices: of the window's frames in it.
    """

    content: bytes
    extension: str
    facts: Mapping[str, Any]
    indices: Sequence[int]


def read_whole(row: Mapping[str, Any], store: Store) -> bytes:
    """The bytes of a surveyed clip.

    Raises:
        ValueError: if they are others by now.
        OSError: if they cannot be read.
    """
    content = piece(row).read(store)
    if hashlib.sha256(content).hexdigest() != row["sha256"]:
        raise ValueError(_CHANGED)
    return content


def cut_out(job: Job, store: Store, fps: float | None, reencode: bool) -> Cut:
    """Cuts a window out of its clip: by copying its packets, or by encoding its frames at the bucket's size.

    Where packets cannot be copied exactly, the whole clip is taken.

    Args:
        job: the window.
        store: that reads the clip.
        fps: of the window; None for the clip's own.
        reencode: whether frames are encoded.

    Raises:
        ValueError: if the clip cannot be read, or is another one by now.
        OSError: likewise.
    """
    row, indices = job.row, job.indices
    path = piece(row).path
    # Of a long file on this disk only what is used is read, so its size has to do in place of its checksum.
    if path is not None and path.stat().st_size != row["bytes"]:
        raise ValueError(_CHANGED)
    source = path or read_whole(row, store)
    if reencode:
        frames = decode_video(source, indices, job.bucket.height, job.bucket.width)
        with tempfile.TemporaryDirectory(prefix="reblock-") as folder:
            target = Path(folder) / "clip.mp4"
            write_video(target, frames, fps or row["facts"]["fps"])
            content = target.read_bytes()
        return Cut(content, "mp4", clip_facts(probe_video(content)), range(len(indices)))
    try:
        content, first = trim_video(source, min(indices), max(indices))
    except ValueError:
        return Cut(read_whole(row, store), row["extension"], row["facts"], indices)
    moved = [index - min(indices) + first for index in indices]
    return Cut(content, clip_suffix(content), clip_facts(probe_video(content)), moved)


class Filler:
    """Makes the samples of shards; each thread has its own.

    Args:
        survey: whose journal the samples refer to.
        store: that reads the clips.
        workers: processes in which clips are cut.
        fps: of the windows; None for each clip's own.
        reencode: whether frames are encoded.
    """

    def __init__(self, survey: Survey, store: Store, workers: WorkerPool, fps: float | None, reencode: bool) -> None:
        self._survey, self._store, self._workers = survey, store, workers
        self._cut_out = partial(cut_out, store=store, fps=fps, reencode=reencode)
        self._reencode = reencode

    def samples(
        self, bucket: Bucket, planned: Sequence[Sample], faults: list[Fault]
    ) -> Iterator[dict[str, bytes | str] | None]:
        """Samples of a shard in their order; None, and a fault, in place of one that cannot be made.

        Args:
            bucket: of the shard.
            planned: what it is to hold.
            faults: grows.
        """
        # Started by the first clip that has to be cut; it reads ahead of this loop, and in the same order.
        cuts = self._workers.map(self._cut_out, self._jobs(bucket, planned), ahead=2)
        for sample in planned:
            job = self._job(bucket, sample)
            result = next(cuts) if self._is_cut(job) else self._whole(job)
            if isinstance(result, Failure):
                faults.append(Fault(sample.key, result.reason, job.row["shard"]))
                yield None
                continue
            facts = {
                "source": job.row["source"],
                "sha256": hashlib.sha256(result.content).hexdigest(),
                **result.facts,
                "indices": list(result.indices),
                "bucket": bucket.name,
            }
            yield {
                "__key__": sample.key,
                result.extension: result.content,
                "txt": job.row["caption"],
                "json": json.dumps(facts, ensure_ascii=False),
            }

    def _jobs(self, bucket: Bucket, planned: Sequence[Sample]) -> Iterator[Job]:
        """Of what has to be cut. A function of its own, since another thread draws from it."""
        for sample in planned:
            job = self._job(bucket, sample)
            if self._is_cut(job):
                yield job

    def _job(self, bucket: Bucket, sample: Sample) -> Job:
        row = self._survey.row(sample.chunk, sample.offset)
        return Job(row, bucket, row["windows"][sample.window][1])

    def _is_cut(self, job: Job) -> bool:
        return self._reencode or is_part(job.indices, job.row["facts"]["frames"])

    def _whole(self, job: Job) -> Cut | Failure:
        try:
            return Cut(read_whole(job.row, self._store), job.row["extension"], job.row["facts"], job.indices)
        except (ValueError, OSError) as error:
            return Failure(str(error))
