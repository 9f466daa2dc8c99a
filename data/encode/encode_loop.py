"""The loop of encoding: leases shards, decodes their clips, runs the models, writes latent shards."""

import contextlib
import functools
import itertools
import time
from collections.abc import Callable, Iterator

import torch
from rich.progress import Progress

from data.encode.clip_batches import DecodedBatch, decode_batches
from data.encode.encoders import Encoders
from data.encode.latent_shard_writer import EncodedBatch, EncodedCaption, EncodedClip, LatentShardWriter
from data.encode.prefetch import prefetch
from data.encode.shard_queue import ShardQueue
from data.encode.stage_timer import CLIPS, WRITER, EncodeTimings, StageTimer
from data.shards.format import Fault, text_digest
from data.video.worker_pool import WorkerPool

#: Decoded batches that are ready for the model, besides the one that is being assembled.
_PREFETCHED_BATCHES = 2


def encode_queue(
    queue: ShardQueue,
    load: Callable[[], Encoders],
    make_pool: Callable[[], contextlib.AbstractContextManager[WorkerPool]],
    *,
    batch_size: int,
    poll: float | None,
) -> EncodeTimings:
    """Encodes the shards that no other process encodes, until none is left.

    Args:
        queue: of this process; its leases send heartbeats.
        load: loads the models; called when the first shard is leased.
        make_pool: makes the decoders; called when the first shard is leased.
        batch_size: clips encoded at once.
        poll: seconds between checks of the shards that other processes encode; None returns instead of waiting.

    Raises:
        ValueError: if too many clips are faulty.
        OSError: if a shard cannot be written.
    """
    timings = EncodeTimings()
    encoders: Encoders | None = None
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(disable=not queue.unfinished))
        task = progress.add_task("encode", total=queue.total_samples)
        pool: WorkerPool | None = None
        while queue.unfinished:
            progress.update(task, completed=queue.finished_samples)
            shards = queue.acquire_shards()
            first = next(shards, None)
            if first is not None:
                pool = pool or stack.enter_context(make_pool())
                # Decoding begins before the weights are loaded, which may take minutes.
                batches = prefetch(
                    decode_batches(itertools.chain([first], shards), pool, batch_size), _PREFETCHED_BATCHES
                )
                with contextlib.closing(batches):
                    encoders = encoders or load()
                    timings += encode_batches(batches, queue, encoders, functools.partial(progress.advance, task))
            queue.refresh()
            if first is None and queue.unfinished:
                if poll is None:
                    break
                time.sleep(poll)
    return timings


def encode_batches(
    batches: Iterator[DecodedBatch], queue: ShardQueue, encoders: Encoders, advance: Callable[[int], None]
) -> EncodeTimings:
    """Runs the models on decoded clips and writes the shards.

    Args:
        batches: of shards that this process has leased.
        queue: of these shards.
        encoders: of the base.
        advance: called with the number of samples of every batch.

    Raises:
        ValueError: if too many clips are faulty.
        OSError: if a shard cannot be written.
    """
    timer = encoders.timer = StageTimer(encoders.device)
    start, count = time.perf_counter(), 0
    with LatentShardWriter(queue.folder, owns=queue.owns, end_task=queue.end_task) as writer:
        while True:
            with timer(CLIPS):
                batch = next(batches, None)
            if batch is None:
                break
            encoded = encode_batch(batch, encoders)
            queue.add_faults(batch.shard, encoded.faults)
            with timer(WRITER):
                writer.put(encoded)
            count += len(batch.clips)
            advance(len(batch.results))
        with timer(WRITER):
            writer.finish()
    return EncodeTimings(count, time.perf_counter() - start, timer.seconds)


def encode_batch(batch: DecodedBatch, encoders: Encoders) -> EncodedBatch:
    """Latents of a batch's clips, and embeddings of the captions that its shard does not have yet."""
    shard, clips = batch.shard, batch.clips
    mean, logvar = encoders.latents(batch.pixels) if batch.pixels is not None else (torch.empty(0), torch.empty(0))
    finite = [bool(torch.isfinite(m).all() and torch.isfinite(v).all()) for m, v in zip(mean, logvar, strict=True)]
    new = {text_digest(clip.caption): clip.caption for clip, is_finite in zip(clips, finite, strict=True) if is_finite}
    new = {digest: caption for digest, caption in new.items() if digest not in shard.captions}
    captions = list(new.values())
    texts = dict(zip(new, zip(encoders.text(captions), encoders.pooled(captions), strict=True), strict=True))
    entries: list[EncodedClip | EncodedCaption] = []
    faults: list[Fault] = []
    latents = iter(zip(mean, logvar, finite, strict=True))
    for result in batch.results:
        if isinstance(result, Fault):
            faults.append(result)
            continue
        m, v, is_finite = next(latents)
        if not is_finite:
            faults.append(Fault(result.key, "the VAE gave numbers that are not finite", shard.name))
            continue
        digest = text_digest(result.caption)
        if digest in texts:
            text, pooled = texts.pop(digest)
            shard.captions[digest] = all(
                bool(torch.isfinite(part).all()) for part in (text, pooled) if part is not None
            )
            if shard.captions[digest]:
                entries.append(EncodedCaption(digest, text, pooled))
        if shard.captions[digest]:
            entries.append(EncodedClip(result, m, v))
        else:
            faults.append(Fault(result.key, "the text encoder gave numbers that are not finite", shard.name))
    return EncodedBatch(shard, entries, faults, batch.last)
