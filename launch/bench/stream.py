"""`reblock bench stream`: samples per second of the loader, and the cost of a resume within an epoch.

The same latent shards are read by our loader, by plain webdataset, and as raw bytes. Rounds are interleaved, so that a
busy machine slows all of them alike. All files are in the page cache, so the software is compared and not the disk.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import webdataset
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from data.batch import Batch, Sample
from data.bucket import Bucket
from data.modules.latents import LatentDataModule
from data.shards.folder import TEXT, ShardFolder
from data.shards.format import LATENT_FORMAT, caption_key, shard_name, text_digest
from launch.bench.result import BenchResult

#: About 150 KB a sample: 12 x 4 x 16 x 16 latents and captions of 20 to 76 tokens, 1024 wide.
BUCKET, CHANNELS, TEXT_WIDTH, TOKENS = Bucket(19, 128, 128), 12, 1024, (20, 76)
BATCH, PER_SHARD = 16, 250
SHUFFLED = 500  # samples in webdataset's shuffle buffer
#: Number of samples, samples per shard and bucket for the measurement of a resume.
SMALL_SAMPLES, SMALL_PER_SHARD, SMALL_BUCKET = 100_000, 1000, Bucket(1, 32, 32)
RESUMED_AT = 0.9

OURS = "reblock"
PLAIN = "plain webdataset, no guarantees"
BYTES = "bytes alone"


def write_shards(folder: Path, samples: int, bucket: Bucket, per_shard: int, tokens: tuple[int, int] | None) -> None:
    """Writes latent shards of noise.

    Args:
        folder: folder to write.
        samples: number of samples.
        bucket: bucket of the samples.
        per_shard: number of samples per shard.
        tokens: lengths of the shortest and longest caption. None gives all samples of a shard the same caption of 4
            tokens, and no metadata.
    """
    generator = torch.Generator().manual_seed(0)
    shape = bucket.latent_shape(CHANNELS)
    pool = torch.randn(64, *shape, generator=generator).half()
    writer = ShardFolder(folder, {"samples": samples, "bucket": bucket.name})

    def entries(first: int, last: int) -> Iterator[dict[str, Any]]:
        for i in range(first, last):
            caption = f"caption {i if tokens else first}"
            digest = text_digest(caption)
            if tokens or i == first:
                length = tokens[0] + i % (tokens[1] - tokens[0] + 1) if tokens else 4
                text = torch.randn(length, TEXT_WIDTH if tokens else 16, generator=generator).half()
                yield {"__key__": caption_key(digest), "safetensors": save_safetensors({"text": text})}
            tensors = {"mean": pool[i % 64], "logvar": pool[(i + 1) % 64]}
            entry = {"__key__": f"clip-{i:07d}", "safetensors": save_safetensors(tensors), TEXT: digest}
            yield entry | ({"json": json.dumps({"caption": caption, "text": digest})} if tokens else {})

    names = []
    for number, first in enumerate(range(0, samples, per_shard)):
        names.append(shard_name(bucket, number))
        writer.write(names[-1], bucket, entries(first, min(first + per_shard, samples)), [])
    head = {"format": LATENT_FORMAT, "channels": CHANNELS, "latents_mean": [0.1] * CHANNELS}
    writer.finish(names, {**head, "latents_std": [0.9] * CHANNELS, "text_width": TEXT_WIDTH if tokens else 16})


def _module(folder: Path, workers: int, batch_size: int = BATCH) -> LatentDataModule:
    return LatentDataModule(shards=str(folder), val_samples=1, batch_size=batch_size, num_workers=workers)


def read_ours(folder: Path, workers: int) -> int:
    """Reads an epoch with our loader; returns the number of samples."""
    return sum(len(batch) for batch in _module(folder, workers).train_dataloader())


def _with_captions(samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Adds its caption embedding to each sample; shards store an embedding before the first sample that uses it."""
    texts: dict[str, bytes] = {}
    prefix = caption_key("")
    for sample in samples:
        key = sample["__key__"]
        if key.startswith(prefix):
            texts[key.removeprefix(prefix)] = sample["safetensors"]
            if len(texts) > PER_SHARD:
                del texts[next(iter(texts))]
        else:
            yield {**sample, "text": texts[json.loads(sample["json"])["text"]]}


class _Decode:
    """Decodes bytes into a normalised sample."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self.mean, self.std = mean, std

    def __call__(self, sample: dict[str, Any]) -> Sample:
        raw = load_safetensors(sample["safetensors"])["mean"].float()
        text = load_safetensors(sample["text"])["text"].float()
        return Sample(latent=(raw - self.mean) / self.std, text=text, key=sample["__key__"], uid=0)


def plain_pipeline(folder: Path, workers: int) -> Iterable[Batch]:
    """The pipeline that webdataset's documentation recommends: shuffled shards, and a shuffle buffer of samples."""
    index = json.loads((folder / "index.json").read_text())
    mean = torch.tensor(index["latents_mean"]).view(-1, 1, 1, 1)
    std = torch.tensor(index["latents_std"]).view(-1, 1, 1, 1)
    shards = [str(folder / entry["name"]) for entry in index["shards"]]
    data = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .compose(_with_captions)
        .shuffle(SHUFFLED)
        .map(_Decode(mean, std))
        .batched(BATCH, collation_fn=Batch.collate)
    )
    return webdataset.WebLoader(data, batch_size=None, num_workers=workers)


def read_plain(folder: Path, workers: int) -> int:
    """Reads an epoch with the plain pipeline; returns the number of samples."""
    return sum(len(batch) for batch in plain_pipeline(folder, workers))


def _read_bytes(shard: Path) -> int:
    buffer, total = bytearray(1 << 20), 0
    with shard.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            total += size
    return total


def read_bytes(folder: Path, workers: int) -> int:
    """Reads the bytes of all shards in `workers` processes; returns the number of samples."""
    index = json.loads((folder / "index.json").read_text())
    shards = [folder / entry["name"] for entry in index["shards"]]
    with ProcessPoolExecutor(max(1, workers), mp_context=get_context("fork")) as pool:
        total = sum(pool.map(_read_bytes, shards))
    if total != index["bytes"]:
        raise RuntimeError(f"read {total} of {index['bytes']} bytes of {folder}")
    return index["samples"]


def rates(folder: Path, workers: int, repeats: int) -> dict[str, list[float]]:
    """Samples per second of each way of reading in each round."""
    ways: dict[str, Callable[[Path, int], int]] = {OURS: read_ours, PLAIN: read_plain, BYTES: read_bytes}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, read in ways.items():
            start = time.perf_counter()
            samples = read(folder, workers)
            if number:  # the first round fills caches
                found[name].append(samples / (time.perf_counter() - start))
    return found


def resume_cost(folder: Path, workers: int, repeats: int, batch_size: int = 64) -> tuple[float, float]:
    """Seconds from the start to the first batch at 90 % of an epoch, and seconds to read the whole epoch."""
    start = time.perf_counter()
    batches = sum(1 for _ in _module(folder, workers, batch_size).train_dataloader())
    whole = time.perf_counter() - start
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        data = _module(folder, workers, batch_size)
        data.load_state_dict({"epoch": 0, "batches": int(RESUMED_AT * batches)})
        next(iter(data.train_dataloader()))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), whole


def run(*, repeats: int = 7, samples: int = 4000, workers: int = 2) -> BenchResult:
    """Measures samples per second of the stream against plain webdataset and bare reading, and the cost of a resume.

    Args:
        repeats: number of timed, interleaved rounds of each.
        samples: number of latents to generate and read.
        workers: number of loader processes.
    """
    with tempfile.TemporaryDirectory(prefix="reblock-bench-") as folder:
        latents, small = Path(folder) / "latents", Path(folder) / "small"
        write_shards(latents, samples, BUCKET, PER_SHARD, TOKENS)
        size = json.loads((latents / "index.json").read_text())["bytes"]
        found = rates(latents, workers, repeats)
        write_shards(small, SMALL_SAMPLES, SMALL_BUCKET, SMALL_PER_SHARD, None)
        resumed, whole = resume_cost(small, workers, repeats)
    plain = statistics.median(found[PLAIN])
    rows = []
    for name, values in found.items():
        ratios = [value / other for value, other in zip(values, found[PLAIN], strict=True)]
        rows.append(
            (
                name,
                f"{statistics.median(values):,.0f}",
                f"{min(values):,.0f} .. {max(values):,.0f}",
                f"{statistics.median(values) * size / samples / 2**20:,.0f}",
                f"{statistics.median(values) / plain:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})",
            )
        )
    what = f"resume at {RESUMED_AT:.0%} of {SMALL_SAMPLES:,} samples"
    rows.append((what, f"{resumed:.2f} s", f"epoch: {whole:.1f} s", "", f"{resumed / whole:.1%} of the epoch"))
    return BenchResult(
        title=f"{samples:,} latents of {size / samples / 1000:.0f} KB, {workers} loader processes, medians of "
        f"{repeats} rounds",
        columns=("", "samples / s", "least .. most", "MiB / s", "of plain webdataset"),
        rows=rows,
        notes=("Shards lie in the page cache. Resume: from nothing to the first batch.",),
    )
