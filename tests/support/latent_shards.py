"""Latent shards on the disk, small enough to be made by the hundred.

Legend: C channels, F latent frames, H W latent grid, D text width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from data.bucket import Bucket
from data.shards.empty_caption import FIELD, empty_caption_entry, write_empty_caption
from data.shards.folder import TEXT, ShardFolder
from data.shards.format import LATENT_FORMAT, caption_key, shard_name, text_digest

Entry = dict[str, Any]


def number_latent(i: int, shape: tuple[int, ...]) -> Tensor:
    """The number of the sample everywhere."""
    return torch.full(shape, float(i % 1000))


def write_latents(
    folder: Path,
    shards: Sequence[tuple[str, int]],
    *,
    channels: int = 2,
    width: int = 8,
    latent: Callable[[int, tuple[int, ...]], Tensor] = number_latent,
    text: Callable[[int], Tensor] | None = None,
    logvar: Callable[[int], float] = lambda i: 0.0,
    spoil: Mapping[int, Callable[[Entry], Entry]] | None = None,
    key: str = "clip-{:02d}",
    family: str = "mochi",
    pooled: Callable[[int], Tensor] | None = None,
    empty: Mapping[str, Tensor] | None = None,
    **head: Any,
) -> str:
    """A folder of shards, (bucket, samples) each; samples are numbered through, and so are their captions.

    Args:
        folder: where they go.
        shards: bucket and number of samples of each.
        channels: C.
        width: D.
        latent: (number, (C, F, H, W)) -> raw latent.
        text: number -> (L, D) embedding; by default i % 4 rows of i.
        logvar: number -> log-variance everywhere.
        spoil: number -> what is done to its entry before it is written.
        key: of a sample, by its number.
        family: that the shards are for.
        pooled: number -> (D_pooled,) pooled embedding of its caption, for a family that takes one.
        empty: `text` and `pooled` of the encoded empty caption, for a family that has one.
        head: fields of the index.

    Returns:
        The folder.
    """
    writer, made, names = ShardFolder(folder, {}), 0, []
    for number, (bucket, count) in enumerate(shards):
        shape = Bucket.parse(bucket, family).latent_shape(channels)
        entries: list[Entry] = []
        for i in range(made, made + count):
            digest = text_digest(f"caption {i}")
            caption = {"text": text(i) if text else torch.full((i % 4, width), float(i % 1000))}
            if pooled is not None:
                caption["pooled"] = pooled(i)
            entries.append({"__key__": caption_key(digest), "safetensors": save(caption)})
            tensors = {"mean": latent(i, shape).half(), "logvar": torch.full(shape, logvar(i)).half()}
            entry = {"__key__": key.format(i), "safetensors": save(tensors), "json": "{}", TEXT: digest}
            entries.append((spoil or {}).get(i, lambda entry: entry)(entry))
        names.append(shard_name(Bucket.parse(bucket, family), number))
        writer.write(names[-1], Bucket.parse(bucket, family), entries, [])
        made += count
    facts: dict[str, Any] = {"channels": channels, "text_width": width, "latents_mean": [0.0] * channels}
    facts["latents_std"] = [1.0] * channels
    if family != "mochi":
        facts["family"] = family
    if pooled is not None:
        facts["pooled_width"] = len(pooled(0))
    if empty is not None:
        write_empty_caption(folder, writer.hash, empty["text"], empty.get("pooled"))
        facts[FIELD] = empty_caption_entry(folder)
    assert writer.finish(names, {"format": LATENT_FORMAT, **facts, **head}) is not None
    return str(folder)
