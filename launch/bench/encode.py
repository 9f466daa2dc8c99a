"""`reblock bench encode`: compares the whole encoding stage with the bare model calls on the same batches.

The stage reads and decodes video shards in other processes, runs both encoders, and writes and hashes latent shards.
The bare calls get decoded batches from memory and discard the results. Rounds of both are interleaved, so that a busy
machine slows both alike. The weights are loaded once, before the rounds.
"""

import contextlib
import io
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from data.base_facts import read_base
from data.bucket import Bucket
from data.encode.clip_batches import DecodedBatch, decode_batches, open_shard
from data.encode.device import default_processes
from data.encode.encode_loop import encode_queue
from data.encode.encoders import Encoders
from data.encode.leases import Leases
from data.encode.shard_queue import ShardQueue
from data.encode.stage_timer import EncodeTimings
from data.pack.command import pack
from data.shards.folder import ShardFolder
from data.shards.format import VIDEO_FORMAT, read_index
from data.storage.store import Store
from data.stream.shard_index import find_shards
from data.synth.command import synth
from data.video.worker_pool import WorkerPool
from launch.bench.result import BenchResult, choose_device

BATCH, SHARD = 8, 32
_TEXT_TOKENS, _DEADLINE = 256, 60.0
_DEMO_BASE = Path(__file__).resolve().parents[2] / "recipes" / "demo_base"
#: Largest number of clips on a CPU; with these a round already takes far longer than the start of the decoders.
_CPU_CLIPS = 128
STAGE, BARE = "whole stage", "bare model calls"


def make_shards(folder: Path, clips: int, bucket: Bucket) -> str:
    """Writes video shards of generated clips, which are square and cover the bucket; returns their folder."""
    with contextlib.redirect_stdout(io.StringIO()):
        synth(folder / "clips", clips=clips, size=max(bucket.height, bucket.width), frames=bucket.frames)
        pack(str(folder / "clips"), folder / "shards", buckets=[bucket.name], shard_samples=SHARD)
    return str(folder / "shards")


def decode_all(shards: str, processes: int) -> list[DecodedBatch]:
    """Decodes the batches of the stage into memory."""
    store = Store()
    works = [open_shard(shards, entry, store) for entry in read_index(shards, store, VIDEO_FORMAT)["shards"]]
    with WorkerPool(processes, _DEADLINE) as pool:
        return list(decode_batches(works, pool, BATCH))


def new_captions(batches: list[DecodedBatch]) -> list[list[str]]:
    """Captions that the stage encodes with each batch; a shard encodes each of its captions once."""
    seen: dict[str, set[str]] = {}
    found = []
    for batch in batches:
        known = seen.setdefault(batch.shard.name, set())
        captions = list(dict.fromkeys(clip.caption for clip in batch.clips if clip.caption not in known))
        known.update(captions)
        found.append(captions)
    return found


@torch.inference_mode()
def call_models(batches: list[DecodedBatch], captions: list[list[str]], encoders: Encoders) -> None:
    """Runs the VAE on every batch, and T5 on its new captions, padded to the longest."""
    for batch, texts in zip(batches, captions, strict=True):
        assert batch.pixels is not None
        pixels = batch.pixels.to(encoders.device).permute(0, 4, 1, 2, 3).to(encoders.dtype)
        encoders.vae.encode(pixels / 127.5 - 1)
        if texts:
            tokens = encoders.tokenizer(texts, padding="longest", return_tensors="pt").to(encoders.device)
            encoders.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)
    if encoders.device.startswith("cuda"):
        torch.cuda.synchronize(encoders.device)


def run_stage(shards: str, out: Path, encoders: Encoders, processes: int) -> EncodeTimings:
    """Runs the stage into an empty folder with loaded encoders; the time includes the start of the decoders."""
    shutil.rmtree(out, ignore_errors=True)
    store = Store()
    with Leases(out / "claims") as leases, contextlib.redirect_stdout(io.StringIO()):
        queue = ShardQueue(ShardFolder(out, {}), find_shards([shards], VIDEO_FORMAT, store), store, leases, 0.0)
        return encode_queue(
            queue, lambda: encoders, lambda: WorkerPool(processes, _DEADLINE), batch_size=BATCH, poll=None
        )


def run(
    *,
    device: str = "auto",
    repeats: int = 7,
    base: Path = _DEMO_BASE,
    clips: int = 1000,
    frames: tuple[int, ...] = (37,),
    height: int = 480,
    width: int = 848,
) -> BenchResult:
    """Times the whole encoding stage against the bare model calls.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        repeats: number of timed, interleaved rounds of each.
        base: pipeline folder of the encoders.
        clips: number of clips to generate; at most 128 on a CPU.
        frames: frames per clip on a GPU, 6k + 1; only the first value is used.
        height: height of the clips on a GPU in pixels, a multiple of 16.
        width: width of the clips on a GPU in pixels, a multiple of 16.
    """
    device = choose_device(device)
    cuda = device.startswith("cuda")
    clips = clips if cuda else min(clips, _CPU_CLIPS)
    bucket = Bucket(frames[0], height, width) if cuda else Bucket(19, 64, 64)
    dtype = torch.bfloat16 if cuda else torch.float32
    read_base(base)
    encoders = Encoders(base, device, dtype, _TEXT_TOKENS, tiling=False)
    processes = default_processes(device)
    seconds: dict[str, list[float]] = {STAGE: [], BARE: []}
    measured = EncodeTimings()
    with tempfile.TemporaryDirectory(prefix="reblock-bench-") as name:
        shards = make_shards(Path(name), clips, bucket)
        batches = decode_all(shards, processes)
        captions = new_captions(batches)
        count = sum(len(batch.clips) for batch in batches)
        call_models(batches[:1], captions[:1], encoders)  # allocates memory and compiles kernels
        for _ in range(repeats):
            start = time.perf_counter()
            measured += run_stage(shards, Path(name) / "latents", encoders, processes)
            seconds[STAGE].append(time.perf_counter() - start)
            start = time.perf_counter()
            call_models(batches, captions, encoders)
            seconds[BARE].append(time.perf_counter() - start)
    added = [whole / alone - 1 for whole, alone in zip(seconds[STAGE], seconds[BARE], strict=True)]
    best = min(seconds[STAGE]) / min(seconds[BARE]) - 1
    rows = [
        [
            kind,
            f"{count / min(values):.2f} ({count / statistics.median(values):.2f}, {count / max(values):.2f})",
            f"{min(values):.2f}",
        ]
        for kind, values in seconds.items()
    ]
    shares = ", ".join(f"{stage} {value / measured.wall:.1%}" for stage, value in measured.seconds.items())
    return BenchResult(
        title=f"Encoding {count} clips {batches[0].shard.bucket.name}, batches of {BATCH}, {processes} decoder(s)",
        columns=("", "clips / s: best (median, worst)", "s: best"),
        rows=rows,
        notes=(
            f"The stage adds {best:.1%} to the best bare round; round by round {statistics.median(added):.1%} "
            f"({min(added):.1%} to {max(added):.1%}). {repeats} rounds of each, interleaved; "
            f"{str(dtype).removeprefix('torch.')}. A "
            "round of the stage begins with starting its decoders and ends with the last shard on the disk.",
            f"Accelerator idle {measured.idle:.1%} of the stage: the share of its time in which no model call ran. "
            f"Where the time went: {shares}.",
        ),
        device=device,
    )
