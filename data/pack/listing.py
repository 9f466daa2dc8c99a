"""A summary of what a source lists, made without opening a clip."""

import hashlib
import json
from dataclasses import dataclass

from data.pack.entries import ByteRange, ClipEntry
from data.pack.sources import ClipSource


@dataclass(frozen=True)
class SourceSummary:
    """Number and digest of the entries of a source.

    Args:
        clips: number of entries, usable or not.
        captioned: number of entries that have a caption.
        digest: changes if a clip or a caption is added, removed, or replaced by one of another size.
        uncaptioned: the first entry without a caption, if there is one.
    """

    clips: int
    captioned: int
    digest: str
    uncaptioned: ClipEntry | None


def summarize(source: ClipSource) -> SourceSummary:
    """Lists a source once."""
    digest, clips, captioned, uncaptioned = hashlib.sha256(), 0, 0, None
    for entry in source.entries():
        clips += 1
        captioned += entry.caption is not None
        if entry.caption is None and uncaptioned is None:
            uncaptioned = entry
        caption = entry.caption if isinstance(entry.caption, str) else _size(entry.caption)
        line = [entry.key, entry.source, entry.extension, caption, _size(entry.clip), entry.problem is None]
        digest.update(json.dumps(line).encode() + b"\n")
    return SourceSummary(clips, captioned, digest.hexdigest()[:16], uncaptioned)


def _size(content: ByteRange | None) -> int | None:
    """Bytes of a local file or of a member. None for a remote file: a request for each would take hours."""
    if content is None or content.path is None:
        return None if content is None else content.size
    try:
        return content.path.stat().st_size
    except (OSError, ValueError):  # ValueError: a name with a zero byte is no path
        return -1  # a file that is missing becomes a fault when it is read
