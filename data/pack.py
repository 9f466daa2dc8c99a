"""Packs clips and captions, of a folder or a table, into video shards."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import Progress

from data.shards import VIDEO_FORMAT, Fault, ShardFolder, check_fault_share
from data.video import probe_video

#: What counts as a clip.
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_TABLES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Entry:
    """A clip to pack: its file, and its caption or the file that holds it."""

    clip: Path
    caption: str | Path

    def read_caption(self) -> str:
        """The caption, stripped.

        Raises:
            ValueError: if its file is missing or not UTF-8.
        """
        if isinstance(self.caption, str):
            return self.caption.strip()
        if not self.caption.is_file():
            raise ValueError(f"no caption {self.caption.name}")
        return self.caption.read_text(encoding="utf-8").strip()


def find_clips(src: Path, caption_suffix: str = ".txt") -> dict[str, Entry]:
    """Clips of a folder, searched in depth, or of a table, by key and sorted by it.

    A key is the path without its suffix, relative to the folder (or the table's), `/` as `--` and `.` as `_`.

    Args:
        src: folder, or a `.csv` or `.jsonl` file with columns `clip` (path, relative to the table) and `caption`.
        caption_suffix: of the caption files beside the clips of a folder.

    Raises:
        ValueError: if there is nothing there, no clip, no caption at all, or two clips of one key.
    """
    if src.is_dir():
        root, entries = src, _folder_entries(src, caption_suffix)
    elif src.is_file() and src.suffix in _TABLES:
        root, entries = src.parent, _table_entries(src)
    else:
        raise ValueError(
            f"{src} is neither a folder of clips and captions nor a table; expected {' or '.join(_TABLES)}."
        )
    found: dict[str, Entry] = {}
    for entry in entries:
        inside = entry.clip.relative_to(root) if entry.clip.is_relative_to(root) else Path(*entry.clip.parts[1:])
        key = "--".join(inside.with_suffix("").parts).replace(".", "_")
        if key in found:
            raise ValueError(f"{found[key].clip} and {entry.clip} would both be packed as {key!r}; rename one of them.")
        found[key] = entry
    if not found:
        raise ValueError(f"{src} holds no clip; expected files ending in {', '.join(VIDEO_SUFFIXES)}.")
    if not any(isinstance(entry.caption, str) or entry.caption.is_file() for entry in found.values()):
        first = next(iter(found.values())).caption
        raise ValueError(
            f"none of the {len(found)} clips in {src} has a caption; expected files like {first}. "
            "Set caption_suffix if yours end otherwise."
        )
    return dict(sorted(found.items()))


def _folder_entries(src: Path, caption_suffix: str) -> Iterator[Entry]:
    for path in sorted(src.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(src).parts)  # or still being written
        if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file() and not hidden:
            yield Entry(path, path.with_suffix(caption_suffix))


def _table_entries(table: Path) -> Iterator[Entry]:
    with table.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file) if table.suffix == ".csv" else map(json.loads, filter(str.strip, file))
        for number, row in enumerate(rows, start=1):
            if not row.get("clip") or row.get("caption") is None:
                raise ValueError(f"row {number} of {table} has {sorted(map(str, row))}, expected `clip` and `caption`.")
            yield Entry(table.parent / row["clip"], row["caption"])


def _sample(key: str, entry: Entry, frames: int) -> dict[str, bytes | str] | Fault:
    try:
        text = entry.read_caption()
        content = entry.clip.read_bytes()
        info = probe_video(content)
    except (ValueError, OSError) as error:
        return Fault(key, str(error))
    if info.frames < frames:
        return Fault(key, f"{info.frames} frames, expected at least {frames}")
    probe = json.dumps({**asdict(info), "source": entry.clip.name})
    return {"__key__": key, entry.clip.suffix[1:].lower(): content, "txt": text, "json": probe}


def _packed(
    clips: dict[str, Entry], frames: int, pool: ThreadPoolExecutor, faults: list[Fault]
) -> Iterator[dict[str, bytes | str]]:
    """Samples of one shard; what is faulty goes to `faults`."""
    for sample in pool.map(lambda key: _sample(key, clips[key], frames), clips):
        if isinstance(sample, Fault):
            faults.append(sample)
        else:
            yield sample


def _listing(clips: dict[str, Entry]) -> str:
    """Changes when a clip or a caption is added, removed or replaced by one of another size."""
    lines = []
    for key, entry in clips.items():
        caption = len(entry.caption) if isinstance(entry.caption, str) else _size(entry.caption)
        lines.append(f"{key}\t{entry.clip.name}\t{_size(entry.clip)}\t{caption}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1  # what is missing is named as a fault when it is read


def pack(
    src: Path,
    out: Path,
    *,
    samples_per_shard: int = 64,
    frames: int = 19,
    caption_suffix: str = ".txt",
    max_fault_share: float = 0.01,
) -> None:
    """Packs clips and captions into `shard-000000.tar`, ... with members KEY.mp4, KEY.txt, KEY.json, and an index.

    Shards that are finished are kept. Clips that cannot be read, are too short or have no caption are left out, named
    in `faults.jsonl` and counted.

    Args:
        src: folder of clips, searched in depth, each with its caption beside it; or a `.csv` or `.jsonl` table with
            columns `clip` and `caption`.
        out: folder of the shards.
        samples_per_shard: clips per shard.
        frames: shortest clip that is taken.
        caption_suffix: of the caption files.
        max_fault_share: the run fails when more than this share of the clips is faulty.

    Raises:
        ValueError: if there is nothing to pack, too much is faulty, or `out` was packed from other clips or settings.
    """
    src, out = Path(src), Path(out)
    if samples_per_shard < 1 or frames < 1:
        raise ValueError(f"got samples_per_shard {samples_per_shard}, frames {frames}; expected at least 1 of each.")
    clips = find_clips(src, caption_suffix)
    settings = {"samples_per_shard": samples_per_shard, "frames": frames, "caption_suffix": caption_suffix}
    folder = ShardFolder(out, {**settings, "clips": len(clips), "listing": _listing(clips)})
    keys = list(clips)
    parts = {f"shard-{i // samples_per_shard:06d}.tar": i for i in range(0, len(keys), samples_per_shard)}
    records = {name: record for name in parts if (record := folder.finished(name))}
    if records:
        print(f"{out}: {len(records)} of {len(parts)} shards are finished already and are kept")
    faults = [Fault(**fault) for record in records.values() for fault in record["faults"]]
    with Progress(disable=len(records) == len(parts)) as progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("pack", total=len(parts), completed=len(records))
        for name, start in parts.items():
            if name in records:
                continue
            found: list[Fault] = []
            chosen = {key: clips[key] for key in keys[start : start + samples_per_shard]}
            folder.write(name, _packed(chosen, frames, pool, found), found)
            faults += found
            check_fault_share(faults, len(keys), max_fault_share, str(src))
            progress.advance(task)
    check_fault_share(faults, len(keys), max_fault_share, str(src))
    index = folder.finish(list(parts), {"format": VIDEO_FORMAT, "frames": frames})
    assert index is not None
    print(f"{out}: {index['samples']} clips in {len(index['shards'])} shards, {len(faults)} faults")
