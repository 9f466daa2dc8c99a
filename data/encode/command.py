"""Video shards to latent shards: the VAE's posterior of every clip, the T5 embedding of every caption.

Any number of processes, on any number of hosts, may encode into one shared folder: each takes the next shard that
nobody has claimed. Clips are decoded ahead of the model and shards written behind it.
"""

import contextlib
import functools
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.progress import Progress

from data.base_folder import read_base, resolve_base
from data.encode.claims import Claims
from data.encode.decoding import Batch, ahead, decoded
from data.encode.encoders import Encoders
from data.encode.output_folder import SETTINGS, agree, check_place
from data.encode.pending import Pending
from data.encode.stopwatch import CLIPS, WRITER, Report, Stopwatch
from data.encode.writer import Caption, Encoded, Latent, ShardWriter
from data.files import settings_hash
from data.shards.folder import ShardFolder
from data.shards.format import LATENT_FORMAT, VIDEO_FORMAT, Fault, text_digest
from data.storage.store import Store
from data.stream.shard_index import find_shards
from data.video.worker_pool import WorkerPool

_DTYPES = ("float32", "bfloat16", "float16")
#: Decoded batches that are ready for the model, besides the one that is being put together.
_AHEAD = 2


def encode(
    shards: str,
    out: Path,
    *,
    base: Path,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "float32",
    max_text_tokens: int = 256,
    tiling: bool = False,
    processes: int | None = None,
    deadline: float = 60.0,
    max_fault_share: float = 0.01,
    claim_timeout: float = 120.0,
    wait: bool = True,
    report: bool = False,
    cache: Path | None = None,
    cache_bytes: int = 64 << 30,
) -> None:
    """Encodes video shards into latent shards, one for one; finished ones are kept.

    Start it as often as there are devices, on any number of hosts that share `out`: each process takes the next shard
    that nobody has claimed, and takes over what a killed one has left. Whoever finds all shards finished writes the
    index.

    Args:
        shards: video shards: a folder, a `.tar` file of one, or several of them by quoted wildcards or
            braces; paths or URLs.
        out: folder of the latent shards, shared by all processes.
        base: diffusers pipeline folder with `vae`, `text_encoder` and `tokenizer`, or the id of a downloaded one.
        batch_size: clips encoded at once.
        device: where the encoders run: cpu, cuda (the one of this task where a node has several), cuda:1, or auto.
        dtype: of the encoders: float32, bfloat16 or float16. Embeddings are kept in float16 unless it is float32.
        max_text_tokens: longer captions are cut.
        tiling: for large or long clips: encode clip by clip, frames above 256 x 256 in overlapping tiles; less memory,
            slightly other latents.
        processes: that decode; None takes all cores but one beside an accelerator, a quarter of them on a CPU.
        deadline: seconds that reading and decoding a clip may take.
        max_fault_share: of all clips, 0 to 1; the run stops when more are faulty.
        claim_timeout: seconds after which a process on another host that gives no sign counts as dead.
        wait: for the shards of other processes, to take them over if those die; else say who holds them and end.
        report: print at the end where the time went.
        cache: folder on this machine for what is remote.
        cache_bytes: its bound.

    Raises:
        ValueError: for a base that lacks a part, shards that are absent, too many faults, or an `out` that is encoded
            with other settings or holds other things.
        OSError: if `out` cannot be written, or a remote index not be read.
    """
    shards, out, device = str(shards), Path(out), choose_device(device)
    processes = usual_processes(device) if processes is None else processes
    if dtype not in _DTYPES or min(batch_size, max_text_tokens, processes) < 1 or not deadline > 0:
        raise ValueError(
            f"got dtype {dtype!r}, batch_size {batch_size}, max_text_tokens {max_text_tokens}, processes {processes}, "
            f"deadline {deadline}; expected a dtype of {_DTYPES}, and more than 0 of the others."
        )
    if not 0 <= max_fault_share <= 1:
        raise ValueError(f"got max_fault_share {max_fault_share}, expected a share from 0 to 1, for example 0.01.")
    folder_of_base = resolve_base(base)
    facts = read_base(folder_of_base)
    store = Store(cache, cache_bytes)
    sources = find_shards([shards], VIDEO_FORMAT, store)
    settings = {
        "source": settings_hash({"shards": [entry["sha256"] for s in sources for entry in s.index["shards"]]}),
        "base": facts.fingerprint, "dtype": dtype, "max_text_tokens": max_text_tokens, "tiling": tiling,
    }  # fmt: skip
    claims = Claims(out / "claims", claim_timeout)
    folder = ShardFolder(out, settings)
    todo = Pending(folder, sources, store, claims, max_fault_share)
    check_place(folder, sources)
    if kept := len(todo.survey()):
        print(f"{out}: {kept} of {len(todo.entries)} shards are finished already and are kept")
    agree(folder, claims)

    def load() -> Encoders:
        # Now that a shard is claimed, nobody takes the folder for abandoned.
        agree(folder, claims)
        return Encoders(folder_of_base, device, getattr(torch, dtype), max_text_tokens, tiling)

    try:
        with claims:
            measured = encode_pending(
                todo,
                load,
                lambda: WorkerPool(processes, deadline),
                batch_size=batch_size,
                poll=min(2.0, claim_timeout / 10) if wait else None,
            )
    except BaseException:
        claims.leave(SETTINGS)
        raise
    if report:
        measured.show()
    if todo.pending:
        print(f"{out}: done here; others hold {len(todo.pending)} shards, and whoever is last writes the index")
        print("\n".join(todo.holders()))
        return
    head = {"format": LATENT_FORMAT, "channels": facts.channels, "latents_mean": facts.mean, "latents_std": facts.std}
    done = todo.finish({**head, "text_width": facts.text_width})
    print(f"{out}: {done['samples']} latents in {len(done['shards'])} shards, {done['faults']} faults")


def usual_processes(device: str) -> int:
    """All cores but one beside an accelerator; a quarter of them where the models need them too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 4 if device == "cpu" else cores - 1)


def choose_device(device: str) -> str:
    """`auto` is cuda where there is one; `cuda` is the device of this task among those of its node.

    Raises:
        ValueError: for another name, or a device that is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if named is None:
        raise ValueError(f"got device {device!r}, expected cpu, cuda, cuda:N (N a number) or auto.")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"got device {device!r}, but torch finds no CUDA device; use cpu, or auto.")
    if named[1]:
        if int(named[1]) >= torch.cuda.device_count():
            raise ValueError(
                f"got device {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices, from 0 on."
            )
        return device
    local = next((os.environ[n] for n in ("LOCAL_RANK", "SLURM_LOCALID") if os.environ.get(n, "").isdigit()), "0")
    # A task that is shown its own device only has device 0, whatever its number.
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def encode_pending(
    todo: Pending,
    load: Callable[[], Encoders],
    make_pool: Callable[[], contextlib.AbstractContextManager[WorkerPool]],
    *,
    batch_size: int,
    poll: float | None,
) -> Report:
    """Encodes what nobody else has claimed, until nothing is left.

    Args:
        todo: of this process; its claims are kept alive.
        load: called once there is something to do.
        make_pool: of decoders; likewise.
        batch_size: clips encoded at once.
        poll: seconds between looks at what others hold; None ends instead of waiting for them.

    Raises:
        ValueError: if too much is faulty.
        OSError: if a shard cannot be written.
    """
    report = Report()
    encoders: Encoders | None = None
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress(disable=not todo.pending))
        task = progress.add_task("encode", total=todo.total)
        pool: WorkerPool | None = None
        while todo.pending:
            progress.update(task, completed=todo.finished_samples)
            works = todo.claimed()
            first = next(works, None)
            if first is not None:
                pool = pool or stack.enter_context(make_pool())
                # Decoding begins before the weights are read, which may take minutes.
                ready = ahead(decoded(itertools.chain([first], works), pool, batch_size), _AHEAD)
                with contextlib.closing(ready):
                    encoders = encoders or load()
                    report += encode_batches(ready, todo, encoders, functools.partial(progress.advance, task))
            todo.survey()
            if first is None and todo.pending:
                if poll is None:
                    break
                time.sleep(poll)
    return report


def encode_batches(
    batches: Iterator[Batch], todo: Pending, encoders: Encoders, advance: Callable[[int], None]
) -> Report:
    """Runs the models over decoded clips and writes the shards.

    Args:
        batches: of shards that this process has claimed.
        todo: told of what is done.
        encoders: of the base.
        advance: told of every batch's clips.

    Raises:
        ValueError: if too much is faulty.
        OSError: if a shard cannot be written.
    """
    watch = encoders.watch = Stopwatch(encoders.device)
    start, count = time.perf_counter(), 0
    with ShardWriter(todo.folder, keep=todo.holds, done=todo.done) as writer:
        while True:
            with watch(CLIPS):
                batch = next(batches, None)
            if batch is None:
                break
            encoded = encode_batch(batch, encoders)
            todo.count(batch.work, encoded.faults)
            with watch(WRITER):
                writer.put(encoded)
            count += len(batch.clips)
            advance(len(batch.found))
        with watch(WRITER):
            writer.finish()
    return Report(count, time.perf_counter() - start, watch.seconds)


def encode_batch(batch: Batch, encoders: Encoders) -> Encoded:
    """Latents of a batch's clips, and embeddings of the captions that its shard has not seen yet."""
    work, clips = batch.work, batch.clips
    mean, logvar = encoders.latents(batch.pixels) if batch.pixels is not None else (torch.empty(0), torch.empty(0))
    sound = [bool(torch.isfinite(m).all() and torch.isfinite(v).all()) for m, v in zip(mean, logvar, strict=True)]
    new = {text_digest(clip.caption): clip.caption for clip, fine in zip(clips, sound, strict=True) if fine}
    new = {digest: caption for digest, caption in new.items() if digest not in work.texts}
    texts = dict(zip(new, encoders.text(list(new.values())), strict=True))
    entries: list[Latent | Caption] = []
    faults: list[Fault] = []
    rows = iter(zip(mean, logvar, sound, strict=True))
    for found in batch.found:
        if isinstance(found, Fault):
            faults.append(found)
            continue
        m, v, fine = next(rows)
        if not fine:
            faults.append(Fault(found.key, "the VAE gave numbers that are not finite", work.name))
            continue
        digest = text_digest(found.caption)
        if digest in texts:
            text = texts.pop(digest)
            work.texts[digest] = bool(torch.isfinite(text).all())
            if work.texts[digest]:
                entries.append(Caption(digest, text))
        if work.texts[digest]:
            entries.append(Latent(found, m, v))
        else:
            faults.append(Fault(found.key, "the text encoder gave numbers that are not finite", work.name))
    return Encoded(work, entries, faults, batch.last)
