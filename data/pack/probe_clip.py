"""Probing one clip of a source: its caption, its facts, and the windows that are packed of it.

The result is a line of the journal (`data.pack.journal`), which is one of

    {"fault": reason, "key", "shard", "again": whether a later run should probe the clip again}
    {"filtered": name of the filter, "key", "reason"}
    {"key", "source", "shard", "clip": [location, offset, size], "extension", "caption", "sha256", "bytes",
     "facts": {codec, frames, fps, height, width, duration}, "windows": [[bucket, [frame indices]], ...]}
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import sha256
from data.pack.entries import ByteRange, ClipEntry, printable
from data.pack.filters import Filters
from data.pack.windows import WindowSettings
from data.shards.archive import refusal
from data.shards.format import FACTS
from data.storage.store import Store, StoreError
from data.video.probe import VideoInfo, probe_times
from data.video.scene_cuts import scene_cuts

JournalLine = dict[str, Any]


@dataclass(frozen=True)
class ProbeSettings:
    """How every clip is probed.

    Args:
        filters: which clips are packed.
        windows: which of their frames.
        store: reads them.
    """

    filters: Filters
    windows: WindowSettings
    store: Store


def probe_clip(entry: ClipEntry, settings: ProbeSettings) -> JournalLine:
    """The journal's line of an entry.

    Raises:
        ValueError: if the clip cannot be used.
        OSError: if it cannot be read.
    """
    if entry.problem is not None:
        raise ValueError(entry.problem)
    if not entry.key or (reason := refusal(f"{entry.key}.{entry.extension}")):
        raise ValueError(f"its key is {entry.key!r}: {reason if entry.key else 'it is empty'}")
    try:
        return _probe(entry, settings)
    except StoreError as error:
        return fault_line(entry, str(error), again=True)


def _probe(entry: ClipEntry, settings: ProbeSettings) -> JournalLine:
    assert entry.clip is not None
    caption = entry.read_caption(settings.store)
    if filtered := settings.filters.caption(caption):
        return _filtered_line(entry, *filtered)
    # A local file is not read into memory as a whole.
    source = entry.clip.path or entry.clip.read(settings.store)
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size == 0:
        raise ValueError("its clip is empty (0 bytes)")
    info, times = probe_times(source)
    if filtered := settings.filters.clip(info):
        return _filtered_line(entry, *filtered)
    threshold = settings.windows.scene_threshold
    cuts = [] if threshold is None else scene_cuts(source, threshold)
    windows = settings.windows.windows(times, info.height, info.width, cuts)
    if not windows:
        return _filtered_line(entry, "bucket", _fits_no_bucket(info, settings.windows))
    clip = entry.clip
    return {
        "key": entry.key,
        "source": entry.source,
        "shard": printable(entry.shard),
        "clip": [clip.location, clip.offset, clip.size],
        "extension": entry.extension,
        "caption": caption,
        "sha256": sha256(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest(),
        "bytes": size,
        "facts": clip_facts(info),
        "windows": [[bucket.name, indices] for bucket, indices in windows],
    }


def _fits_no_bucket(info: VideoInfo, windows: WindowSettings) -> str:
    rate = "" if windows.fps is None else f" at {windows.fps:g} fps"
    facts = f"{info.frames} frames, {info.fps:.4g} fps, {info.height}x{info.width}"
    return f"{facts}: fits none of {', '.join(bucket.name for bucket in windows.buckets)}{rate}"


def _filtered_line(entry: ClipEntry, name: str, reason: str) -> JournalLine:
    return {"filtered": name, "key": entry.key, "reason": reason}


def fault_line(entry: ClipEntry, reason: str, *, again: bool = False) -> JournalLine:
    """The journal's line of a clip that cannot be used."""
    return {"fault": printable(reason), "key": entry.key, "shard": printable(entry.shard), "again": again}


def clip_facts(info: VideoInfo) -> dict[str, Any]:
    """The facts of a clip in the JSON of its sample."""
    return {name: getattr(info, name) for name in FACTS}


def clip_content(line: Mapping[str, Any]) -> ByteRange:
    """The video file of the clip that a line describes."""
    return ByteRange(*line["clip"])
