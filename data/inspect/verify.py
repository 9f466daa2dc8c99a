"""Whether shards hold what their records say: checksums, places, and every sample read."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.progress import Progress
from safetensors import SafetensorError

from data.bucket import Bucket
from data.inspect.decode import check_clip
from data.shards.archive import Members, Scan, scan_tar
from data.shards.format import VIDEO_FORMAT, read_samples
from data.storage.store import Store, join
from data.stream.latents import LatentDataset
from data.stream.shard_index import Source, sample_count
from data.video.worker_pool import Failure, WorkerPool

_CHUNK = 1 << 24


def verify_shards(
    sources: Sequence[Source], store: Store, *, processes: int | None = None, deadline: float = 60.0
) -> Iterator[str]:
    """Faults of shards, in words, as they are found.

    Args:
        sources: the shards, of one format.
        store: that reads them; a remote shard is copied to this machine for the time it takes.
        processes: that decode clips; None takes one for each core.
        deadline: seconds that one clip may take.
    """
    with Progress(transient=True) as progress, WorkerPool(processes or os.cpu_count() or 1, deadline) as pool:
        task = progress.add_task("verify", total=sample_count(sources))
        videos = sources[0].index["format"] == VIDEO_FORMAT
        check = _clips(pool) if videos else _latents(LatentDataset(sources, store=store))
        for source in sources:
            for entry in source.index["shards"]:
                yield from _verify(source.folder, entry, store, check)
                progress.advance(task, entry["samples"])


#: Local copy of a shard, its bucket, its samples -> faults.
_Check = Callable[[str, Bucket, list[tuple[str, Members]], Store], Iterable[str]]


def _verify(folder: str, entry: Mapping[str, Any], store: Store, check: _Check) -> Iterator[str]:
    shard = join(folder, entry["name"])
    try:
        samples, bucket = read_samples(folder, entry["name"], store), Bucket.parse(entry["bucket"])
        with store.local(shard) as path:
            if _sha256(path) != entry["sha256"]:
                yield f"{shard}: its checksum differs from the index"
            scan = scan_tar(path)
            yield from (f"{shard}: {fault}" for fault in _places(scan, samples, entry["samples"]))
            yield from (f"{shard}: {fault}" for fault in check(str(path), bucket, samples, store))
    except (ValueError, OSError) as error:
        yield f"{shard}: {error}"


def _sha256(path: Any) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _places(scan: Scan, samples: list[tuple[str, Members]], expected: int) -> Iterator[str]:
    """Where the archive and its record differ."""
    if scan.damage:
        yield scan.damage
    yield from (f"{name}: {why}" for name, why in scan.refused)
    if len(samples) != expected:
        yield f"its record lists {len(samples)} samples, the index {expected}"
    found = {(key, extension): member for key, members in scan.samples for extension, member in members.items()}
    # Whatever is no sample's: captions that samples share.
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


def _clips(pool: WorkerPool) -> _Check:
    def check(path: str, bucket: Bucket, samples: list[tuple[str, Members]], store: Store) -> Iterator[str]:
        answers = pool.map(check_clip, [(path, bucket, members, store) for _, members in samples])
        for (key, _), answer in zip(samples, answers, strict=True):
            if isinstance(answer, Failure):
                yield f"{key}: {answer.reason}"

    return check


def _latents(dataset: LatentDataset) -> _Check:
    def check(path: str, bucket: Bucket, samples: list[tuple[str, Members]], store: Store) -> Iterator[str]:
        for key, members in samples:
            try:
                dataset.load(path, key, members, uid=0, bucket=bucket)
            except KeyError as error:
                yield f"{key}: lacks {error}"
            except (ValueError, OSError, SafetensorError) as error:
                yield f"{key}: {error}"

    return check
