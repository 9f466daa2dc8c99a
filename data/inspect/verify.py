"""Whether shards hold what their records say: checksums, offsets, and every sample."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.progress import Progress
from safetensors import SafetensorError

from data.bucket import Bucket
from data.files import sha256
from data.inspect.sample_clips import check_clip
from data.shards.archive import Members, Scan, scan_tar
from data.shards.empty_caption import FIELD, read_empty_caption
from data.shards.format import VIDEO_FORMAT, read_samples
from data.storage.store import Store, join
from data.stream.latents import LatentReader
from data.stream.reader import Visit
from data.stream.shard_index import IndexedShards, sample_count
from data.video.worker_pool import Failure, WorkerPool


def verify_shards(
    sources: Sequence[IndexedShards], store: Store, *, processes: int | None = None, deadline: float = 60.0
) -> Iterator[str]:
    """Yields messages on faults of shards.

    Args:
        sources: the shards, of one format.
        store: reads them; a remote shard is copied to this machine while it is verified.
        processes: number of processes that decode clips; None takes one for each core.
        deadline: seconds for one clip.
    """
    with Progress(transient=True) as progress, WorkerPool(processes or os.cpu_count() or 1, deadline) as pool:
        task = progress.add_task("verify", total=sample_count(sources))
        videos = sources[0].index["format"] == VIDEO_FORMAT
        check = _clip_check(pool) if videos else _latent_check(LatentReader(sources, store=store))
        for source in sources:
            if FIELD in source.index:
                yield from _empty_caption_faults(source, store)
            for entry in source.index["shards"]:
                yield from _verify_shard(source.folder, entry, source.family.name, store, check)
                progress.advance(task, entry["samples"])


def _empty_caption_faults(source: IndexedShards, store: Store) -> Iterator[str]:
    try:
        read_empty_caption(source.folder, source.index, store)
    except (ValueError, OSError) as error:
        yield str(error)


#: (local copy of a shard, its bucket, its samples, store) -> messages.
_Check = Callable[[str, Bucket, list[tuple[str, Members]], Store], Iterable[str]]


def _verify_shard(folder: str, entry: Mapping[str, Any], family: str, store: Store, check: _Check) -> Iterator[str]:
    shard = join(folder, entry["name"])
    try:
        samples, bucket = read_samples(folder, entry["name"], store), Bucket.parse(entry["bucket"], family)
        with store.local(shard) as path:
            if sha256(path) != entry["sha256"]:
                yield f"{shard}: its checksum differs from the index"
            scan = scan_tar(path)
            yield from (f"{shard}: {fault}" for fault in _offset_faults(scan, samples, entry["samples"]))
            yield from (f"{shard}: {fault}" for fault in check(str(path), bucket, samples, store))
    except (ValueError, OSError) as error:
        yield f"{shard}: {error}"


def _offset_faults(scan: Scan, samples: list[tuple[str, Members]], expected: int) -> Iterator[str]:
    """Differences between an archive and its record."""
    if scan.damage:
        yield scan.damage
    yield from (f"{name}: {why}" for name, why in scan.refused)
    if len(samples) != expected:
        yield f"its record lists {len(samples)} samples, the index {expected}"
    found = {(key, extension): member for key, members in scan.samples for extension, member in members.items()}
    # Members that belong to no sample: captions that samples share.
    keys = {key for key, _ in samples}
    texts = {member: key for (key, _), member in found.items() if key not in keys}
    used = set()
    for key, members in samples:
        for extension, member in members.items():
            if extension == "text" and member in texts:
                used.add(texts[member])
            elif found.get((key, extension)) != member:
                yield f"{key}: its {extension} is not where the record says"
    for key in sorted({*texts.values()} - used):
        yield f"{key}: it is in the archive and not in the record"


def _clip_check(pool: WorkerPool) -> _Check:
    def check(path: str, bucket: Bucket, samples: list[tuple[str, Members]], store: Store) -> Iterator[str]:
        results = pool.map(check_clip, [(path, bucket, members, store) for _, members in samples])
        for (key, _), result in zip(samples, results, strict=True):
            if isinstance(result, Failure):
                yield f"{key}: {result.reason}"

    return check


def _latent_check(reader: LatentReader) -> _Check:
    def check(path: str, bucket: Bucket, samples: list[tuple[str, Members]], store: Store) -> Iterator[str]:
        for key, members in samples:
            try:
                reader.decode(key, reader.read_files(path, members), Visit(0), bucket=bucket)
            except KeyError as error:
                yield f"{key}: lacks {error}"
            except (ValueError, OSError, SafetensorError) as error:
                yield f"{key}: {error}"

    return check
