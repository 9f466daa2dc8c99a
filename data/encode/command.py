"""`reblock encode`: video shards to latent shards.

A latent shard holds the VAE's posterior of every clip and the embedding of every caption, for a base of any family of
`data.families`. Any number of processes, on any number of hosts, may encode into one shared folder: each leases the
next shard that no other process encodes.
"""

import functools
from pathlib import Path

import torch

from data.base_facts import read_base
from data.base_folder import resolve_base
from data.encode.device import choose_device, default_processes
from data.encode.empty_caption import add_empty_caption
from data.encode.encode_loop import encode_queue
from data.encode.encoders import Encoders, TextEncoders
from data.encode.family_checks import check_sizes, check_text_tokens
from data.encode.leases import Leases
from data.encode.output_folder import SETTINGS, check_output_folder, register_settings
from data.encode.shard_queue import ShardQueue
from data.files import settings_hash
from data.shards.empty_caption import FIELD
from data.shards.folder import ShardFolder
from data.shards.format import LATENT_FORMAT, VIDEO_FORMAT
from data.storage.store import Store
from data.stream.shard_index import find_shards
from data.video.worker_pool import WorkerPool

_DTYPES = ("float32", "bfloat16", "float16")


def encode(
    shards: str,
    out: Path,
    *,
    base: Path,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "float32",
    text_dtype: str = "float32",
    max_text_tokens: int | None = None,
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

    Start one process per device, on any number of hosts that share `out`. Each process takes the next shard that no
    other process encodes, and takes over the shards of killed processes. The process that finds all shards finished
    writes the index. Families whose empty caption is an encoded one get it in a file of its own; a folder that lacks
    it gets it, and its shards are kept.

    Args:
        shards: video shards: a folder, a `.tar` file of one, or several of them by quoted wildcards or
            braces; paths or URLs.
        out: folder of the latent shards, shared by all processes.
        base: diffusers pipeline folder with `vae`, `text_encoder` and `tokenizer`, or the id of a downloaded one.
        batch_size: clips encoded at once.
        device: where the encoders run: cpu, cuda (this task's device on a node with several), cuda:1, or auto.
        dtype: of the VAE: float32, bfloat16 or float16.
        text_dtype: of the text encoders, likewise; Mochi was trained with float32. Embeddings are stored in float16
            unless both are float32.
        max_text_tokens: longer captions are truncated; None takes the family's: Mochi 256, Wan 2.1 512, HunyuanVideo
            256, CogVideoX what its transformer says (226).
        tiling: for large or long clips: encode clip by clip, and frames above 256 x 256 in overlapping tiles. It
            needs less memory and gives slightly different latents.
        processes: number of decoders; None takes all cores but one beside an accelerator, a quarter of them on a CPU.
        deadline: seconds for reading and decoding one clip.
        max_fault_share: of all clips, 0 to 1; the run stops if more are faulty.
        claim_timeout: seconds without a heartbeat after which a process on another host counts as dead.
        wait: for the shards of other processes, to take them over if a process dies; else name the processes and end.
        report: print how long each stage took.
        cache: folder on this machine for bytes of remote shards.
        cache_bytes: size limit of the cache.

    Raises:
        ValueError: if the base lacks a part, clips have sizes that its family does not take, shards are absent, too
            many clips are faulty, or `out` is encoded with other settings or holds other files.
        OSError: if `out` cannot be written, or a remote index cannot be read.
    """
    shards, out, device = str(shards), Path(out), choose_device(device)
    processes = default_processes(device) if processes is None else processes
    _check_options((dtype, text_dtype), batch_size, max_text_tokens, processes, deadline, max_fault_share)
    base_folder = resolve_base(base)
    facts = read_base(base_folder)
    max_text_tokens = check_text_tokens(facts.family, facts.text_tokens, max_text_tokens)
    store = Store(cache, cache_bytes)
    sources = find_shards([shards], VIDEO_FORMAT, store)
    check_sizes(sources, facts.family)
    settings = {
        "source": settings_hash({"shards": [entry["sha256"] for s in sources for entry in s.index["shards"]]}),
        "base": facts.fingerprint, "dtype": dtype, "max_text_tokens": max_text_tokens, "tiling": tiling,
    }  # fmt: skip
    if text_dtype != dtype:
        settings["text_dtype"] = text_dtype
    leases = Leases(out / "claims", claim_timeout)
    folder = ShardFolder(out, settings)
    queue = ShardQueue(folder, sources, store, leases, max_fault_share, facts.family.name)
    check_output_folder(folder, sources)
    if finished := len(queue.refresh()):
        print(f"{out}: {finished} of {len(queue.entries)} shards are finished already and are kept")
    register_settings(folder, leases)

    weights = getattr(torch, dtype), getattr(torch, text_dtype)

    def load() -> Encoders:
        # Again, now that this process has a lease: before, another process could remove the folder as unused.
        register_settings(folder, leases)
        encoders = Encoders(base_folder, device, weights[0], max_text_tokens, tiling, weights[1])
        if facts.family.encodes_empty:
            add_empty_caption(folder, lambda: encoders)
        return encoders

    try:
        with leases:
            timings = encode_queue(
                queue,
                load,
                lambda: WorkerPool(processes, deadline),
                batch_size=batch_size,
                poll=min(2.0, claim_timeout / 10) if wait else None,
            )
    except BaseException:
        leases.remove_if_unused(SETTINGS)
        raise
    if report:
        timings.print_table()
    if queue.unfinished:
        print(f"{out}: done here; others hold {len(queue.unfinished)} shards, and whoever is last writes the index")
        print("\n".join(queue.describe_owners()))
        return
    head = {"format": LATENT_FORMAT, **facts.index_fields()}
    if facts.family.encodes_empty:  # missing where all shards were finished by a version that did not write it
        load_text = functools.partial(TextEncoders, base_folder, device, weights[0], max_text_tokens, weights[1])
        head[FIELD] = add_empty_caption(folder, load_text)
    index = queue.write_index(head)
    print(f"{out}: {index['samples']} latents in {len(index['shards'])} shards, {index['faults']} faults")


def _check_options(
    dtypes: tuple[str, str],
    batch_size: int,
    max_text_tokens: int | None,
    processes: int,
    deadline: float,
    max_fault_share: float,
) -> None:
    if (
        not set(dtypes) <= set(_DTYPES)
        or min(batch_size, 1 if max_text_tokens is None else max_text_tokens, processes) < 1
        or not deadline > 0
    ):
        raise ValueError(
            f"got dtype {dtypes[0]!r}, text_dtype {dtypes[1]!r}, batch_size {batch_size}, max_text_tokens "
            f"{max_text_tokens}, processes {processes}, deadline {deadline}; expected dtypes of {_DTYPES}, and more "
            "than 0 of the others."
        )
    if not 0 <= max_fault_share <= 1:
        raise ValueError(f"got max_fault_share {max_fault_share}, expected a share from 0 to 1, for example 0.01.")
