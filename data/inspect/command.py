"""`reblock inspect`: what shards hold, and whether they are damaged."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data.inspect.choose_samples import choose_samples
from data.inspect.contact_sheet import draw_latents, draw_videos
from data.inspect.statistics import latent_table, two_columns, video_table
from data.inspect.verify import verify_shards
from data.shards.empty_caption import FIELD
from data.shards.format import LATENT_FORMAT, VIDEO_FORMAT, read_index
from data.storage.store import Store, expand, join
from data.stream.shard_index import IndexedShards, find_shards, sample_count
from data.video.worker_pool import WorkerPool

#: Statistics of a large folder are of so many samples; `verify` reads all.
_SAMPLED = 512
#: Samples on a contact sheet.
_SHOWN = 16


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
        verify: also compare checksums and offsets with the archives, and read every sample; each fault is printed.
        contact_sheet: PNG to write, with frames of some clips and their captions, or latents in three colours.
        processes: number of processes that decode clips; None takes one for each core.
        deadline: seconds for decoding one clip.

    Raises:
        ValueError: if there are no shards, they are of two formats, or `verify` finds a fault.
        OSError: if the contact sheet cannot be written.
    """
    if contact_sheet is not None and Path(contact_sheet).is_dir():
        raise ValueError(f"got contact_sheet {contact_sheet}, a folder; expected a file, for example sheet.png.")
    store = Store()
    sources = _find_sources(str(shards), store)
    console = Console(width=120)
    console.print(_summary(str(shards), sources))
    for source in sources:
        if source.index["faults"]:
            _print_faults(console, source.folder, store)
    videos = sources[0].index["format"] == VIDEO_FORMAT
    chosen = choose_samples(sources, store, _SAMPLED)
    if videos:
        console.print(video_table(chosen, store))
    else:
        table, doubts = latent_table(sources, chosen, store)
        console.print(table)
        for doubt in doubts:
            console.print(f"[bold red]normalisation in doubt:[/] {doubt}")
    if contact_sheet is not None:
        shown = choose_samples(sources, store, _SHOWN)
        if videos:
            with WorkerPool(min(processes or os.cpu_count() or 1, len(shown) or 1), deadline) as pool:
                draw_videos(shown, store, Path(contact_sheet), pool)
        else:
            draw_latents(shown, store, Path(contact_sheet))
        console.print(f"contact sheet: {contact_sheet}", markup=False)
    if verify:
        faults = 0
        for fault in verify_shards(sources, store, processes=processes, deadline=deadline):
            console.print(f"fault: {fault}", markup=False)
            faults += 1
        if faults:
            raise ValueError(f"{faults} faults in {shards}, named above; make the shards they lie in again.")
        checksums = sum(len(source.index["shards"]) + (FIELD in source.index) for source in sources)
        console.print(f"verified: {checksums} checksums, {sample_count(sources)} samples")


def _find_sources(location: str, store: Store) -> list[IndexedShards]:
    """Shards of the format that the first one has; errors as `find_shards`."""
    first = expand(location)[0].rstrip("/")
    folder = (first.rpartition("/")[0] or ".") if first.endswith(".tar") else first
    return find_shards([location], read_index(folder, store)["format"], store)


def _summary(shards: str, sources: Sequence[IndexedShards]) -> Table:
    index, total = sources[0].index, sample_count(sources)
    entries = [entry for source in sources for entry in source.index["shards"]]
    # Faults of clips that came into no shard belong to the folder, also if only some of its shards are inspected.
    partial = any(sample_count([source]) < source.index["samples"] for source in sources)
    rows = {
        "format": index["format"],
        "made for": sources[0].family.title,
        "folders": len(sources),
        "shards": len(entries),
        "samples": total,
        "bytes": f"{sum(entry['bytes'] for entry in entries):,}",
        "left out as faulty" + " of the whole folder" * partial: sum(source.index["faults"] for source in sources),
    }
    for name in dict.fromkeys(entry["bucket"] for entry in entries):
        counts = [entry["samples"] for entry in entries if entry["bucket"] == name]
        rows[f"bucket {name}"] = f"{sum(counts)} samples ({sum(counts) / total:.1%}) in {len(counts)} shards"
    if index["format"] == LATENT_FORMAT:
        rows |= {"latent channels": index["channels"], "text width": index["text_width"]}
        if sources[0].family.encodes_empty:
            missing = sum(FIELD not in source.index for source in sources)
            said = f"not in {missing} of {len(sources)} folders: `reblock encode` adds it"
            rows["empty caption"] = said if missing else "encoded"
    return two_columns(shards, rows)


def _print_faults(console: Console, folder: str, store: Store, shown: int = 10) -> None:
    lines = store.read(join(folder, "faults.jsonl")).decode().splitlines()
    for line in lines[:shown]:
        fault = json.loads(line)
        console.print(f"left out: {fault['shard']} {fault['key']}: {fault['reason']}", markup=False)
    if len(lines) > shown:
        console.print(f"... and {len(lines) - shown} more in {join(folder, 'faults.jsonl')}", markup=False)
