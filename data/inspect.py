"""What is in a folder of shards: counts, shapes, durations, captions, faults, a contact sheet.

Legend: C latent channels, F latent frames, H W latent grid, T video frames, L text tokens.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError

from data.shards import LATENT_FORMAT, VIDEO_FORMAT, Member, list_samples, read_index, read_member, sha256
from data.stream import LatentDataset, read_clip, read_json
from data.video import decode_video

#: Latent statistics of a large folder are taken from so many samples, spread evenly; `verify` takes all.
_SAMPLED = 512


def inspect(shards: Path, *, verify: bool = False, contact_sheet: Path | None = None) -> None:
    """Prints what a folder of video or latent shards holds.

    Args:
        shards: folder written by `reblock pack` or `reblock encode`.
        verify: also compare every checksum and read every sample; every fault is printed.
        contact_sheet: PNG to write, frames of some clips with their captions; video shards only.

    Raises:
        ValueError: if there are no shards, `verify` finds a fault, or a contact sheet of latents is asked for.
    """
    shards = Path(shards)
    index = read_index(shards)
    videos = index["format"] == VIDEO_FORMAT
    if contact_sheet is not None and not videos:
        raise ValueError(f"{shards} holds latents, expected video shards for a contact sheet; give their folder.")
    console = Console(width=120)
    console.print(_summary(shards, index))
    if index["faults"]:
        _print_faults(console, shards)
    if verify:
        found = list(_verify(shards, index))
        for fault in found:
            console.print(f"fault: {fault}", markup=False)
        if found:
            raise ValueError(f"{len(found)} faults in {shards}, named above; make the shards they lie in again.")
        console.print(f"verified: {len(index['shards'])} checksums, {index['samples']} samples")
    console.print(_video_facts(shards, index) if videos else _latent_facts(shards, everything=verify))
    if contact_sheet is not None:
        _draw_sheet(shards, index, Path(contact_sheet))
        console.print(f"contact sheet: {contact_sheet}", markup=False)


def _rows(title: str, rows: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _summary(shards: Path, index: Mapping[str, Any]) -> Table:
    rows = {
        "format": index["format"],
        "shards": len(index["shards"]),
        "samples": index["samples"],
        "bytes": f"{index['bytes']:,}",
        "left out as faulty": index["faults"],
    }
    if index["format"] == LATENT_FORMAT:
        rows |= {"latent shape (C, F, H, W)": tuple(index["latent_shape"]), "text width": index["text_width"]}
    return _rows(str(shards), rows)


def _print_faults(console: Console, shards: Path) -> None:
    lines = (shards / "faults.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[:10]:
        fault = json.loads(line)
        console.print(f"left out: {fault['key']}: {fault['reason']}", markup=False)
    if len(lines) > 10:
        console.print(f"... and {len(lines) - 10} more in {shards / 'faults.jsonl'}", markup=False)


def _samples(shards: Path, index: Mapping[str, Any]) -> Iterator[tuple[Path, str, Mapping[str, Member]]]:
    for entry in index["shards"]:
        path = shards / entry["name"]
        for key, members in list_samples(path).items():
            yield path, key, members


def _verify(shards: Path, index: Mapping[str, Any]) -> Iterator[str]:
    """Faults of checksums, counts and samples."""
    latents = LatentDataset([shards]) if index["format"] == LATENT_FORMAT else None
    for entry in index["shards"]:
        path = shards / entry["name"]
        if sha256(path) != entry["sha256"]:
            yield f"{path}: its checksum differs from the index"
        try:
            samples = list_samples(path)
        except ValueError as error:
            yield str(error)
            continue
        if len(samples) != entry["samples"]:
            yield f"{path}: holds {len(samples)} samples, its index says {entry['samples']}"
        for key, members in samples.items():
            try:
                if latents is None:
                    decode_video(read_clip(path, members))
                else:
                    latents.load(path, key, members, uid=0)
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                yield f"{path}: {key}: {error}"


def _spread(values: Sequence[float], unit: str = "") -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:g} / {middle:g} / {high:g}{unit}"


def _video_facts(shards: Path, index: Mapping[str, Any]) -> Table:
    probes, words = [], []
    for path, _, members in _samples(shards, index):
        probes.append(read_json(path, members))
        words.append(len(read_member(path, members["txt"]).decode().split()))
    sizes = Counter(f"{probe['width']}x{probe['height']}" for probe in probes)
    rows = {
        "size (width x height)": ", ".join(f"{size}: {count}" for size, count in sizes.most_common(5)),
        "frames (least / median / most)": _spread([probe["frames"] for probe in probes]),
        "duration": _spread([probe["frames"] / probe["fps"] for probe in probes], " s"),
        "caption length": _spread(words, " words"),
        "empty captions": sum(count == 0 for count in words),
    }
    return _rows("clips", rows)


def _latent_facts(shards: Path, *, everything: bool) -> Table:
    """Normalised latents should have about mean 0 and deviation 1 per channel: the base's own statistics say so."""
    dataset = LatentDataset([shards])
    count = len(dataset) if everything else min(_SAMPLED, len(dataset))
    chosen = [dataset[int(number)] for number in np.linspace(0, len(dataset) - 1, count).round()]
    total = np.zeros((2, dataset.latent_shape[0]))
    for sample in chosen:
        values = sample.latent.double().flatten(1).numpy()
        total += np.stack([values.mean(axis=1), np.square(values).mean(axis=1)])
    mean, square = total / len(chosen)
    lengths = [len(sample.text) for sample in chosen]
    rows: dict[str, Any] = {
        "samples read": len(chosen),
        "caption length (least / median / most)": _spread(lengths, " tokens"),
        "empty captions": sum(length == 0 for length in lengths),
    }
    for channel, (m, s) in enumerate(zip(mean, np.sqrt(np.maximum(square - mean**2, 0)), strict=True)):
        rows[f"channel {channel:2d}, normalised"] = f"mean {m:+.3f}  std {s:.3f}"
    return _rows("latents", rows)


def _draw_sheet(shards: Path, index: Mapping[str, Any], path: Path, clips: int = 16, frames: int = 5) -> None:
    """Strips of frames of clips that are spread evenly over the shards, each under its caption."""
    samples = list(_samples(shards, index))
    chosen = [samples[int(i)] for i in np.unique(np.linspace(0, len(samples) - 1, clips).round().astype(int))]
    rows = -(-len(chosen) // 2)
    figure = Figure(figsize=(14, 1.75 * rows), layout="constrained")
    for axis, sample in zip(figure.subplots(rows, 2, squeeze=False).flat, [*chosen, *[None] * rows], strict=False):
        axis.set_axis_off()
        if sample is not None:
            shard, key, members = sample
            video = decode_video(read_clip(shard, members))
            picked = np.linspace(0, len(video) - 1, min(frames, len(video))).round().astype(int)
            axis.imshow(np.concatenate(list(video[picked]), axis=1))
            caption = read_member(shard, members["txt"]).decode()
            axis.set_title(f"{key}: {caption}"[:110], fontsize=7, loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
