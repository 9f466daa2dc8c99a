"""Latent shards written in a thread, behind the model."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from safetensors.torch import save as save_safetensors
from torch import Tensor

from data.encode.decoding import Clip, Work
from data.shards.folder import TEXT, Sample, ShardFolder
from data.shards.format import Fault, caption_key, text_digest

#: Batches that may wait to be written; another one makes the model wait.
_WAITING = 4


@dataclass(frozen=True)
class Latent:
    """An encoded sample; (C, F, H, W) float16 each, raw."""

    clip: Clip
    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class Caption:
    """An encoded caption, (L, D); comes before the first sample that uses it."""

    digest: str
    text: Tensor


@dataclass(frozen=True)
class Encoded:
    """A batch to be written.

    Args:
        work: its shard. Batches of a shard come one after another.
        entries: in the order of the archive.
        faults: of its clips.
        last: whether the shard ends with it.
    """

    work: Work
    entries: list[Latent | Caption]
    faults: list[Fault]
    last: bool


class _Dropped(Exception):
    """A shard that is not to be finished."""


class ShardWriter:
    """Writes shards in the order they come; a context that ends when all of them are in place.

    Left by an exception, it drops the shard whose last batch has not come.

    Args:
        folder: of the latent shards.
        keep: asked before a shard is finished; false drops it.
        done: told of every shard that is in place, with its record, and of every one that was dropped, with None.
    """

    def __init__(
        self, folder: ShardFolder, keep: Callable[[Work], bool], done: Callable[[Work, dict | None], None]
    ) -> None:
        self._folder, self._keep, self._done = folder, keep, done
        self._queue: queue.Queue[Encoded | None] = queue.Queue(maxsize=_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> "ShardWriter":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        if kind is None and self._error is not None:
            raise self._error

    def _close(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def finish(self) -> None:
        """Waits until every shard is in its place.

        Raises:
            OSError: that writing met.
        """
        self._close()
        if self._error is not None:
            raise self._error

    def put(self, batch: Encoded) -> None:
        """Hands a batch over; waits while too many wait already.

        Raises:
            OSError: that writing met, as soon as it is known.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(batch)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            if self._error is not None:
                continue  # drawn off, so that nobody waits to hand over
            try:
                self._write(first)
            except BaseException as error:  # raised in the caller's thread
                self._error = error

    def _write(self, first: Encoded) -> None:
        work = first.work
        faults: list[Fault] = []
        try:
            record = self._folder.write(work.name, work.bucket, self._samples(first, faults), faults)
        except _Dropped:
            self._done(work, None)
        except FileNotFoundError:
            # Another process took the shard over and cleared the unfinished file away.
            if self._keep(work):
                raise
            self._done(work, None)
        else:
            self._done(work, record)

    def _samples(self, batch: Encoded, faults: list[Fault]) -> Iterator[Sample]:
        """Samples of the shard that begins with `batch`."""
        while True:
            faults += batch.faults
            for entry in batch.entries:
                yield _sample(entry, batch.work)
            if batch.last:
                break
            following = self._queue.get()
            if following is None:
                self._queue.put(None)  # for the loop over shards
                raise _Dropped
            batch = following
        if not self._keep(batch.work):
            raise _Dropped


def _sample(entry: Latent | Caption, work: Work) -> Sample:
    if isinstance(entry, Caption):
        return {
            "__key__": caption_key(entry.digest),
            "safetensors": save_safetensors({"text": entry.text.contiguous()}),
        }
    clip, bucket, digest = entry.clip, work.bucket, text_digest(entry.clip.caption)
    facts = {
        "caption": clip.caption, "text": digest, "frames": bucket.frames, "height": bucket.height,
        "width": bucket.width, "source": clip.source, "indices": clip.indices,
    }  # fmt: skip
    tensors = {"mean": entry.mean.contiguous(), "logvar": entry.logvar.contiguous()}
    return {
        "__key__": clip.key, "safetensors": save_safetensors(tensors), "json": json.dumps(facts, ensure_ascii=False),
        TEXT: digest,
    }  # fmt: skip
