"""Layered scenes straight to latent shards: drawn and encoded on one device, without video files between."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import save

from data.base_facts import read_base
from data.base_folder import resolve_base
from data.bucket import Bucket
from data.encode.encoders import Encoders
from data.families import DEFAULT_FAMILY
from data.shards.folder import TEXT, ShardFolder, TarSample
from data.shards.format import LATENT_FORMAT, caption_key, shard_name, text_digest
from data.synth.layered import choose_layered_scene
from data.synth.layered_draw import render_layered

_DTYPES = ("float32", "bfloat16", "float16")


def synth_latents(
    out: Path,
    *,
    base: Path,
    clips: int = 96,
    seed: int = 0,
    size: int = 128,
    frames: int = 43,
    shard_samples: int = 512,
    batch_size: int = 16,
    device: str = "cpu",
    dtype: str = "float32",
    part: int = 0,
    parts: int = 1,
) -> None:
    """Writes latent shards of procedural clips with several objects, textures and a moving camera.

    Clip i is a function of (seed, i) alone. Finished shards are kept. Several processes share the work where each is
    given another `part`; whoever finds all shards finished writes the index.

    Args:
        out: folder of the latent shards.
        base: diffusers pipeline folder with `vae`, `text_encoder` and `tokenizer`.
        clips: how many, over all parts.
        seed: of the scenes; another seed gives other scenes.
        size: side of the square frames in pixels, a multiple of 16.
        frames: frames per clip, 6 k + 1.
        shard_samples: clips per shard.
        batch_size: clips encoded at once.
        device: where clips are drawn and encoded: cpu or cuda.
        dtype: of the encoders: float32, bfloat16 or float16.
        part: this process makes the shards whose number leaves this remainder when divided by `parts`.
        parts: how many processes share the work.

    Raises:
        ValueError: for settings that do not fit, a base that lacks a part, or a folder made with other settings.
    """
    out, bucket = Path(out), Bucket(frames, size, size)
    if min(clips, shard_samples, batch_size) < 1 or dtype not in _DTYPES or not 0 <= part < parts:
        raise ValueError(
            f"got clips {clips}, shard_samples {shard_samples}, batch_size {batch_size}, dtype {dtype!r}, part {part} "
            f"of {parts}; expected counts of at least 1, a dtype of {_DTYPES}, and 0 <= part < parts."
        )
    folder_of_base = resolve_base(base)
    facts = read_base(folder_of_base)
    if facts.family is not DEFAULT_FAMILY:
        raise ValueError(
            f"got a base of {facts.family.title}, expected {DEFAULT_FAMILY.title}: these clips are drawn for it alone."
        )
    settings = {
        "scenes": "layered", "seed": seed, "size": size, "frames": frames, "shard_samples": shard_samples,
        "base": facts.fingerprint, "dtype": dtype,
    }  # fmt: skip
    folder = ShardFolder(out, settings)
    ranges = [range(start, min(start + shard_samples, clips)) for start in range(0, clips, shard_samples)]
    names = [shard_name(bucket, number) for number in range(len(ranges))]
    own = list(zip(names, ranges, strict=True))[part::parts]
    todo = [(name, indices) for name, indices in own if folder.finished(name) is None]
    if todo:
        encoders = Encoders(folder_of_base, device, getattr(torch, dtype), max_text_tokens=256)
        with Progress() as progress:
            task = progress.add_task("clips", total=sum(len(indices) for _, indices in todo))
            for name, indices in todo:
                folder.write(name, bucket, _samples(encoders, bucket, seed, indices, batch_size), [])
                progress.advance(task, len(indices))
    index = folder.finish(names, {"format": LATENT_FORMAT, **facts.index_fields()})
    whole = "all shards are finished" if index else "other parts are not finished; whoever is last writes the index"
    print(f"{out}: {sum(len(indices) for _, indices in todo)} clips made, {whole}")


def _samples(
    encoders: Encoders, bucket: Bucket, seed: int, indices: Sequence[int], batch_size: int
) -> Iterator[TarSample]:
    """Entries of one shard, each caption before the first clip that has it."""
    written: set[str] = set()
    for start in range(0, len(indices), batch_size):
        rows = indices[start : start + batch_size]
        scenes = [choose_layered_scene(seed, index) for index in rows]
        video = render_layered(scenes, size=bucket.width, frames=bucket.frames, device=encoders.device)
        means, logvars = encoders.latents(video)
        for index, scene, mean, logvar in zip(rows, scenes, means, logvars, strict=True):
            digest = text_digest(scene.caption)
            if digest not in written:
                written.add(digest)
                text = encoders.text([scene.caption])[0]
                yield {"__key__": caption_key(digest), "safetensors": save({"text": text.contiguous()})}
            yield {
                "__key__": f"clip-{index:06d}",
                "safetensors": save({"mean": mean.contiguous(), "logvar": logvar.contiguous()}),
                "json": _facts(scene.caption, bucket, index),
                TEXT: digest,
            }


def _facts(caption: str, bucket: Bucket, index: int) -> str:
    return json.dumps(
        {"caption": caption, "frames": bucket.frames, "height": bucket.height, "width": bucket.width,
         "source": f"layered scene {index}"},
        ensure_ascii=False,
    )  # fmt: skip
