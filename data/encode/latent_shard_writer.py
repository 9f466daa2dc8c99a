"""A thread that writes latent shards while the model runs."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from safetensors.torch import save as save_safetensors
from torch import Tensor

from data.encode.clip_batches import DecodedClip, ShardTask
from data.shards.folder import TEXT, ShardFolder, TarSample
from data.shards.format import Fault, caption_key, text_digest

#: Most batches in the queue; `put` waits while it is full.
_QUEUE_SIZE = 4


@dataclass(frozen=True)
class EncodedClip:
    """The posterior of a clip: mean and log-variance, raw, (C, F, H, W) float16 each."""

    clip: DecodedClip
    mean: Tensor
    logvar: Tensor


@dataclass(frozen=True)
class EncodedCaption:
    """The embedding of a caption, (L, D), and its pooled one, (D,); it comes before the first clip that uses it."""

    digest: str
    text: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class EncodedBatch:
    """A batch to write.

    Args:
        shard: that it belongs to. The batches of a shard come one after another.
        entries: in the order of the archive.
        faults: of its clips.
        last: whether it is the shard's last batch.
    """

    shard: ShardTask
    entries: list[EncodedClip | EncodedCaption]
    faults: list[Fault]
    last: bool


class _ShardDropped(Exception):
    """The shard that is being written will not be finished."""


class LatentShardWriter:
    """Writes shards in the order in which their batches come; a context that ends when all of them are complete.

    If the context ends with an exception, the shard whose last batch has not come is dropped.

    Args:
        folder: of the latent shards.
        owns: called before a shard is finished; if it returns false, the shard is dropped.
        end_task: called with every finished shard and its record, and with every dropped shard and None.
    """

    def __init__(
        self,
        folder: ShardFolder,
        owns: Callable[[ShardTask], bool],
        end_task: Callable[[ShardTask, dict | None], None],
    ) -> None:
        self._folder, self._owns, self._end_task = folder, owns, end_task
        self._queue: queue.Queue[EncodedBatch | None] = queue.Queue(maxsize=_QUEUE_SIZE)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)

    def __enter__(self) -> "LatentShardWriter":
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
        """Waits until every shard is complete.

        Raises:
            OSError: of the writing thread.
        """
        self._close()
        if self._error is not None:
            raise self._error

    def put(self, batch: EncodedBatch) -> None:
        """Adds a batch to the queue; waits while the queue is full.

        Raises:
            OSError: of the writing thread, from an earlier batch.
        """
        if self._error is not None:
            raise self._error
        self._queue.put(batch)

    def _run(self) -> None:
        while (first := self._queue.get()) is not None:
            if self._error is not None:
                continue  # empties the queue, so that `put` does not wait forever
            try:
                self._write_shard(first)
            except BaseException as error:  # the caller's thread raises it
                self._error = error

    def _write_shard(self, first: EncodedBatch) -> None:
        shard = first.shard
        faults: list[Fault] = []
        try:
            record = self._folder.write(shard.name, shard.bucket, self._samples(first, faults), faults)
        except _ShardDropped:
            self._end_task(shard, None)
        except FileNotFoundError:
            # Another process took the lease over and removed the unfinished file.
            if self._owns(shard):
                raise
            self._end_task(shard, None)
        else:
            self._end_task(shard, record)

    def _samples(self, batch: EncodedBatch, faults: list[Fault]) -> Iterator[TarSample]:
        """Samples of the shard that begins with `batch`; its faults are added to `faults`."""
        while True:
            faults += batch.faults
            for entry in batch.entries:
                yield _sample(entry, batch.shard)
            if batch.last:
                break
            following = self._queue.get()
            if following is None:
                self._queue.put(None)  # `_run` has to see it too
                raise _ShardDropped
            batch = following
        if not self._owns(batch.shard):
            raise _ShardDropped


def _sample(entry: EncodedClip | EncodedCaption, shard: ShardTask) -> TarSample:
    if isinstance(entry, EncodedCaption):
        texts = {"text": entry.text.contiguous()}
        if entry.pooled is not None:
            texts["pooled"] = entry.pooled.contiguous()
        return {"__key__": caption_key(entry.digest), "safetensors": save_safetensors(texts)}
    clip, bucket, digest = entry.clip, shard.bucket, text_digest(entry.clip.caption)
    facts = {
        "caption": clip.caption, "text": digest, "frames": bucket.frames, "height": bucket.height,
        "width": bucket.width, "source": clip.source, "indices": clip.indices,
    }  # fmt: skip
    tensors = {"mean": entry.mean.contiguous(), "logvar": entry.logvar.contiguous()}
    return {
        "__key__": clip.key, "safetensors": save_safetensors(tensors), "json": json.dumps(facts, ensure_ascii=False),
        TEXT: digest,
    }  # fmt: skip
