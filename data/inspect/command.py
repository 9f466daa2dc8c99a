"""What is in shards: counts, buckets, durations, captions, latent statistics, faults, a contact sheet.

Legend: C latent channels, F latent frames, H W latent grid, T video frames, L text tokens.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors import SafetensorError

from data.inspect.contact_sheet import draw_latents, draw_videos
from data.inspect.verify import verify_shards
from data.shards.archive import Members
from data.shards.format import FACTS, LATENT_FORMAT, VIDEO_FORMAT, read_index, read_json, read_member, read_samples
from data.storage.store import Store, expand, join
from data.stream.latents import LatentDataset
from data.stream.shard_index import Source, find_shards, sample_count
from data.video.worker_pool import WorkerPool

#: Facts of a large folder are taken from so many samples, spread evenly; `verify` reads all.
_SAMPLED = 512
#: Normalised latents of one channel have about mean 0 and deviation 1; beyond these the normalisation is in doubt.
_MEAN, _STD = 0.5, (0.6, 1.6)


def inspect(
    shards: str,
    *,
    verify: bool = False,
    contact_sheet: Path | None = None,
    processes: int | None = None,
    deadline: float = 60.0,
) -> None:
    """Prints what video or latent shards hold.

    Args:
        shards: what `reblock pack` or `reblock encode` wrote: a folder, a `.tar` file of one, or several of them by
            quoted wildcards or braces; paths or URLs.
        verify: also compare every checksum and every place with the archives, and read every sample; each fault is
            printed.
        contact_sheet: PNG to write: frames of some clips with their captions, or latents in three colours.
        processes: that decode clips to show or verify them; None takes one for each core.
        deadline: seconds that one clip may take to decode.

    Raises:
        ValueError: if there are no shards, they are of two kinds, or `verify` finds a fault.
        OSError: if the contact sheet cannot be written.
    """
    if contact_sheet is not None and Path(contact_sheet).is_dir():
        raise ValueError(f"got contact_sheet {contact_sheet}, a folder; expected a file, for example sheet.png.")
    store = Store()
    sources = _find(str(shards), store)
    console = Console(width=120)
    console.print(_summary(str(shards), sources))
    for source in sources:
        if source.index["faults"]:
            _print_faults(console, source.folder, store)
    videos = sources[0].index["format"] == VIDEO_FORMAT
    chosen = _spread_over(sources, store, _SAMPLED)
    if videos:
        console.print(_video_facts(chosen, store))
    else:
        table, doubts = _latent_facts(sources, chosen, store)
        console.print(table)
        for doubt in doubts:
            console.print(f"[bold red]normalisation in doubt:[/] {doubt}")
    if contact_sheet is not None:
        shown = _spread_over(sources, store, 16)
        if videos:
            with WorkerPool(min(processes or os.cpu_count() or 1, len(shown) or 1), deadline) as pool:
                draw_videos(shown, store, Path(contact_sheet), pool)
        else:
            draw_latents(shown, store, Path(contact_sheet))
        console.print(f"contact sheet: {contact_sheet}", markup=False)
    if verify:
        found = 0
        for fault in verify_shards(sources, store, processes=processes, deadline=deadline):
            console.print(f"fault: {fault}", markup=False)
            found += 1
        if found:
            raise ValueError(f"{found} faults in {shards}, named above; make the shards they lie in again.")
        checksums = sum(len(source.index["shards"]) for source in sources)
        console.print(f"verified: {checksums} checksums, {sample_count(sources)} samples")


Placed = tuple[str, str, Members]  # shard, key, members


def _find(location: str, store: Store) -> list[Source]:
    """Shards of one kind, whichever; as `find_shards`."""
    first = expand(location)[0].rstrip("/")
    folder = (first.rpartition("/")[0] or ".") if first.endswith(".tar") else first
    return find_shards([location], read_index(folder, store)["format"], store)


def _spread_over(sources: Sequence[Source], store: Store, count: int) -> list[Placed]:
    """About `count` samples, spread evenly: only the records of the shards that they lie in are read."""
    entries = [(source.folder, entry) for source in sources for entry in source.index["shards"]]
    ends = np.cumsum([entry["samples"] for _, entry in entries])
    wanted = np.unique(np.linspace(0, ends[-1] - 1, min(count, int(ends[-1]))).round().astype(int))
    which = np.searchsorted(ends, wanted, side="right")
    chosen: list[Placed] = []
    for number in np.unique(which):
        folder, entry = entries[number]
        try:
            samples = read_samples(folder, entry["name"], store)
        except (ValueError, OSError):
            continue  # `verify` names it
        first = int(ends[number]) - entry["samples"]
        inside = [int(w) - first for w in wanted[which == number]]
        chosen += [(join(folder, entry["name"]), *samples[place]) for place in inside if place < len(samples)]
    return chosen


def _rows(title: str, rows: Mapping[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, min_width=len(title))
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _summary(shards: str, sources: Sequence[Source]) -> Table:
    index, total = sources[0].index, sample_count(sources)
    entries = [entry for source in sources for entry in source.index["shards"]]
    # Faults of clips that came to no shard belong to none: they are counted by folder.
    part = any(sample_count([source]) < source.index["samples"] for source in sources)
    rows = {
        "format": index["format"],
        "folders": len(sources),
        "shards": len(entries),
        "samples": total,
        "bytes": f"{sum(entry['bytes'] for entry in entries):,}",
        "left out as faulty" + " of the whole folder" * part: sum(source.index["faults"] for source in sources),
    }
    for name in dict.fromkeys(entry["bucket"] for entry in entries):
        counts = [entry["samples"] for entry in entries if entry["bucket"] == name]
        rows[f"bucket {name}"] = f"{sum(counts)} samples ({sum(counts) / total:.1%}) in {len(counts)} shards"
    if index["format"] == LATENT_FORMAT:
        rows |= {"latent channels": index["channels"], "text width": index["text_width"]}
    return _rows(shards, rows)


def _print_faults(console: Console, shards: str, store: Store, shown: int = 10) -> None:
    lines = store.read(join(shards, "faults.jsonl")).decode().splitlines()
    for line in lines[:shown]:
        fault = json.loads(line)
        console.print(f"left out: {fault['shard']} {fault['key']}: {fault['reason']}", markup=False)
    if len(lines) > shown:
        console.print(f"... and {len(lines) - shown} more in {join(shards, 'faults.jsonl')}", markup=False)


def _spread(values: Sequence[float], unit: str = "") -> str:
    low, middle, high = np.quantile(values, [0, 0.5, 1])
    return f"{low:g} / {middle:g} / {high:g}{unit}"


def _read_all(chosen: Sequence[Placed], read: Callable[[Placed], Any]) -> Iterator[tuple[Any, str | None]]:
    """What `read` gives of each, or why it cannot be read; several at a time, as remote stores like it."""

    def attempt(placed: Placed) -> tuple[Any, str | None]:
        try:
            return read(placed), None
        except (ValueError, KeyError, OSError, SafetensorError) as error:
            return None, f"{placed[0]}: {placed[1]}: {error}"

    with ThreadPoolExecutor(8) as pool:
        yield from pool.map(attempt, chosen)


def _none_of(answers: Sequence[tuple[Any, str | None]]) -> str:
    return f"{len(answers)} of {len(answers)}" + (f"; first: {answers[0][1]}" if answers else ", their records neither")


def _video_facts(chosen: Sequence[Placed], store: Store) -> Table:
    def read(placed: Placed) -> tuple[dict[str, Any], str]:
        shard, _, members = placed
        facts, caption = read_json(shard, members, store), read_member(shard, members["txt"], store).decode()
        return {name: facts[name] for name in FACTS}, caption

    answers = list(_read_all(chosen, read))
    read_well = [answer for answer, fault in answers if fault is None]
    if not read_well:
        return _rows("clips", {"unreadable": _none_of(answers)})
    facts = [fact for fact, _ in read_well]
    captions = [caption for _, caption in read_well]
    sizes = Counter(f"{fact['height']}x{fact['width']} {fact['codec']}" for fact in facts)
    rows = {
        "samples read": f"{len(read_well)}, {len(answers) - len(read_well)} unreadable",
        "height x width, codec": ", ".join(f"{size}: {count}" for size, count in sizes.most_common(5)),
        "frames of a clip (least / median / most)": _spread([fact["frames"] for fact in facts]),
        "duration of a clip": _spread([fact["duration"] for fact in facts], " s"),
        "frames per second": _spread([fact["fps"] for fact in facts]),
        "caption length": _spread([len(caption.split()) for caption in captions], " words"),
        "empty captions": sum(not caption for caption in captions),
    }
    return _rows("clips", rows)


def _latent_facts(sources: Sequence[Source], chosen: Sequence[Placed], store: Store) -> tuple[Table, list[str]]:
    """Statistics per channel of normalised latents, and what is wrong with them."""
    dataset, index = LatentDataset(sources, store=store), sources[0].index

    def read(placed: Placed) -> tuple[NDArray[np.float64], int, int]:
        sample = dataset.load(*placed, uid=0)
        values = sample.latent.double().flatten(1).numpy()
        moments = np.stack([values.mean(axis=1), np.square(values).mean(axis=1)])
        return moments, len(sample.text), 6 * (sample.latent.shape[1] - 1) + 1

    answers = list(track(_read_all(chosen, read), description="latents", total=len(chosen), transient=True))
    read_well = [answer for answer, fault in answers if fault is None]
    if not read_well:
        return _rows("latents", {"unreadable": _none_of(answers)}), []
    # Each sample counts the same, so that one bucket of long clips does not speak for all.
    mean, square = np.mean([moments for moments, _, _ in read_well], axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0))
    lengths = [length for _, length, _ in read_well]
    rows: dict[str, Any] = {
        "samples read": f"{len(read_well)}, {len(answers) - len(read_well)} unreadable",
        "frames of a clip (least / median / most)": _spread([frames for _, _, frames in read_well]),
        "caption length": _spread(lengths, " tokens"),
        "empty captions": sum(length == 0 for length in lengths),
    }
    for channel, (m, s) in enumerate(zip(mean, std, strict=True)):
        flag = "" if abs(m) <= _MEAN and _STD[0] <= s <= _STD[1] else "  <- expected about 0 and 1"
        rows[f"channel {channel:2d}, normalised"] = f"mean {m:+.3f}  std {s:.3f}{flag}"
    return _rows("latents", rows), normalisation_doubts(mean, std, index["latents_mean"], index["latents_std"])


def normalisation_doubts(
    mean: NDArray[np.float64], std: NDArray[np.float64], vae_mean: Sequence[float], vae_std: Sequence[float]
) -> list[str]:
    """What is wrong with the normalisation of latents, in words.

    Args:
        mean: (C,) of the normalised latents.
        std: (C,) likewise.
        vae_mean: (C,) that they were normalised with.
        vae_std: (C,) likewise.
    """
    doubts = []
    far = [c for c in range(len(mean)) if abs(mean[c]) > _MEAN or not _STD[0] <= std[c] <= _STD[1]]
    if far:
        doubts.append(
            f"channels {far} are far from mean 0 and deviation 1; expected raw latents of the base whose latents_mean "
            "and latents_std the index holds."
        )
    # Latents that were stored normalised are normalised twice: their deviations follow 1 / latents_std.
    spread = np.log(np.asarray(vae_std, dtype=np.float64))
    if spread.std() > 0.05 and np.log(std.clip(1e-6)).std() > 0:
        slope, likeness = _fit(spread, np.log(std.clip(1e-6)))
        if likeness < -0.95 and -1.5 < slope < -0.67:
            doubts.append(
                f"deviations follow 1 / latents_std (correlation {likeness:.3f}): the latents seem to have been stored "
                "normalised and are normalised twice; expected raw ones."
            )
    return doubts


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of y over x, and their correlation."""
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x)), float(x @ y / np.sqrt((x @ x) * (y @ y)))
