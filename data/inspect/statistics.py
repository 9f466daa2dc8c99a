"""Tables of what samples hold: facts of clips, statistics of latents.

Legend: C latent channels, F latent frames, H W latent grid, L text tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError

from data.inspect.choose_samples import SampleLocation
from data.inspect.normalisation import is_off, normalisation_doubts
from data.shards.format import FACTS, read_json, read_member
from data.storage.store import Store
from data.stream.latents import LatentReader
from data.stream.reader import Visit
from data.stream.shard_index import IndexedShards


def two_columns(title: str, rows: Mapping[str, Any]) -> Table:
    """A table of names and values."""
    table = Table(title=title, title_justify="left", show_header=False, min_width=len(title))
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def video_table(chosen: Sequence[SampleLocation], store: Store) -> Table:
    """Facts of clips and their captions; clips that cannot be read are counted."""

    def read(sample: SampleLocation) -> tuple[dict[str, Any], str]:
        shard, _, members = sample
        facts, caption = read_json(shard, members, store), read_member(shard, members["txt"], store).decode()
        return {name: facts[name] for name in FACTS}, caption

    results = list(_read_samples(chosen, read))
    readable = [result for result, fault in results if fault is None]
    if not readable:
        return two_columns("clips", {"unreadable": _all_unreadable(results)})
    facts = [fact for fact, _ in readable]
    captions = [caption for _, caption in readable]
    sizes = Counter(f"{fact['height']}x{fact['width']} {fact['codec']}" for fact in facts)
    rows = {
        "samples read": f"{len(readable)}, {len(results) - len(readable)} unreadable",
        "height x width, codec": ", ".join(f"{size}: {count}" for size, count in sizes.most_common(5)),
        "frames of a clip (least / median / most)": _range([fact["frames"] for fact in facts]),
        "duration of a clip": _range([fact["duration"] for fact in facts], " s"),
        "frames per second": _range([fact["fps"] for fact in facts]),
        "caption length": _range([len(caption.split()) for caption in captions], " words"),
        "empty captions": sum(not caption for caption in captions),
    }
    return two_columns("clips", rows)


def latent_table(
    sources: Sequence[IndexedShards], chosen: Sequence[SampleLocation], store: Store
) -> tuple[Table, list[str]]:
    """Statistics per channel of normalised latents, and doubts about their normalisation."""
    reader, index = LatentReader(sources, store=store), sources[0].index
    stride = sources[0].family.frame_stride

    def read(sample_location: SampleLocation) -> tuple[NDArray[np.float64], int, int]:
        shard, key, members = sample_location
        sample = reader.decode(key, reader.read_files(shard, members), Visit(0))
        values = sample.latent.double().flatten(1).numpy()
        moments = np.stack([values.mean(axis=1), np.square(values).mean(axis=1)])
        return moments, len(sample.text), stride * (sample.latent.shape[1] - 1) + 1

    results = list(track(_read_samples(chosen, read), description="latents", total=len(chosen), transient=True))
    readable = [result for result, fault in results if fault is None]
    if not readable:
        return two_columns("latents", {"unreadable": _all_unreadable(results)}), []
    # Each sample has the same weight, so that a bucket of long clips does not dominate.
    mean, square = np.mean([moments for moments, _, _ in readable], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    lengths = [length for _, length, _ in readable]
    rows: dict[str, Any] = {
        "samples read": f"{len(readable)}, {len(results) - len(readable)} unreadable",
        "frames of a clip (least / median / most)": _range([frames for _, _, frames in readable]),
        "caption length": _range(lengths, " tokens"),
        "empty captions": sum(length == 0 for length in lengths),
    }
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        flag = "  <- expected about 0 and 1" if is_off(m, s) else ""
        rows[f"channel {channel:2d}, normalised"] = f"mean {m:+.3f}  std {s:.3f}{flag}"
    return two_columns("latents", rows), normalisation_doubts(mean, std, index["latents_mean"], index["latents_std"])


def _read_samples(
    chosen: Sequence[SampleLocation], read: Callable[[SampleLocation], Any]
) -> Iterator[tuple[Any, str | None]]:
    """(result of `read`, None) or (None, reason) for each sample; eight at a time, because remote stores are slow."""

    def attempt(sample: SampleLocation) -> tuple[Any, str | None]:
        try:
            return read(sample), None
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            return None, f"{sample.shard}: {sample.key}: {error}"

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(attempt, chosen)


def _all_unreadable(results: Sequence[tuple[Any, str | None]]) -> str:
    return f"{len(results)} of {len(results)}" + (f"; first: {results[0][1]}" if results else ", their records neither")


def _range(values: Sequence[float], unit: str = "") -> str:
    """Least, median and largest value."""
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:g} / {middle:g} / {high:g}{unit}"
