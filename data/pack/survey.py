"""The first pass of packing: what every clip of a source is, and what it is used for, journalled as it is found out.

`survey/settings.json` says what was asked; `survey/000000.jsonl`, ... have one line for each of 256 entries of the
source, in its order; `survey/done.json` is there when all of them are. A line is one of

    {"fault": why, "key", "shard", "again": whether asking again may help}
    {"filtered": name of the filter, "key", "reason"}
    {"key", "source", "shard", "clip": [location, offset, size], "extension", "caption", "sha256", "bytes",
     "facts": {codec, frames, fps, height, width, duration}, "windows": [[bucket, [frame indices]], ...]}
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from data.files import sha256, write_json, write_text
from data.pack.entries import Entry, Piece, printable
from data.pack.sources import Source
from data.pack.windows import Cutting, Filters
from data.shards.archive import refusal
from data.shards.format import FACTS, Fault, check_fault_share
from data.storage.store import Store, StoreError
from data.video.probe import VideoInfo, probe_times
from data.video.scene_cuts import scene_cuts
from data.video.worker_pool import Failure, WorkerPool

#: Entries of one file of the journal: what a kill costs at most.
CHUNK = 256
#: What can be done about too many faults: a survey is of one source as it was.
MEND = "Raise max_fault_share to go on without them; or mend or remove them and pack into another folder."

Row = dict[str, Any]


def clip_facts(info: VideoInfo) -> dict[str, Any]:
    """What is said of a clip in its JSON."""
    return {name: getattr(info, name) for name in FACTS}


@dataclass(frozen=True)
class Rules:
    """What is asked of every clip.

    Args:
        filters: which clips are wanted.
        cutting: which of their frames.
        store: that reads them.
    """

    filters: Filters
    cutting: Cutting
    store: Store


def survey_clip(entry: Entry, rules: Rules) -> Row:
    """The journal's line of an entry.

    Raises:
        ValueError: if it cannot be used.
        OSError: if it cannot be read.
    """
    if entry.problem is not None:
        raise ValueError(entry.problem)
    if not entry.key or (why := refusal(f"{entry.key}.{entry.extension}")):
        raise ValueError(f"its key is {entry.key!r}: {why if entry.key else 'it is empty'}")
    try:
        return _survey(entry, rules)
    except StoreError as error:
        return _fault(entry, str(error), again=True)


def _fault(entry: Entry, reason: str, *, again: bool = False) -> Row:
    return {"fault": printable(reason), "key": entry.key, "shard": printable(entry.shard), "again": again}


def _survey(entry: Entry, rules: Rules) -> Row:
    assert entry.clip is not None
    caption = entry.read_caption(rules.store)
    if unwanted := rules.filters.caption(caption):
        return _filtered(entry, unwanted)
    # A file on this disk is never held as a whole.
    source = entry.clip.path or entry.clip.read(rules.store)
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size == 0:
        raise ValueError("its clip is empty (0 bytes)")
    info, times = probe_times(source)
    if unwanted := rules.filters.clip(info):
        return _filtered(entry, unwanted)
    cutting = rules.cutting
    cuts = [] if cutting.scene_threshold is None else scene_cuts(source, cutting.scene_threshold)
    windows = cutting.windows(times, info.height, info.width, cuts)
    if not windows:
        at = "" if cutting.fps is None else f" at {cutting.fps:g} fps"
        seen = f"{info.frames} frames, {info.fps:.4g} fps, {info.height}x{info.width}"
        names = ", ".join(bucket.name for bucket in cutting.buckets)
        return _filtered(entry, ("bucket", f"{seen}: fits none of {names}{at}"))
    digest = sha256(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    place = entry.clip
    return {
        "key": entry.key,
        "source": entry.source,
        "shard": printable(entry.shard),
        "clip": [place.location, place.offset, place.size],
        "extension": entry.extension,
        "caption": caption,
        "sha256": digest,
        "bytes": size,
        "facts": clip_facts(info),
        "windows": [[bucket.name, indices] for bucket, indices in windows],
    }


def _filtered(entry: Entry, unwanted: tuple[str, str]) -> Row:
    return {"filtered": unwanted[0], "key": entry.key, "reason": unwanted[1]}


def piece(row: Mapping[str, Any]) -> Piece:
    """Where the clip of a journal's line is."""
    return Piece(*row["clip"])


@dataclass(frozen=True)
class Listing:
    """What a source lists.

    Args:
        clips: entries, whatever can be done with them.
        captioned: entries that have a caption.
        digest: changes when a clip or a caption is added, removed, or replaced by one of another size.
        example: the first entry without a caption, if there is one.
    """

    clips: int
    captioned: int
    digest: str
    example: Entry | None


def list_source(source: Source) -> Listing:
    """Walks a source once; no clip is opened."""
    digest, clips, captioned, example = hashlib.sha256(), 0, 0, None
    for entry in source.entries():
        clips += 1
        captioned += entry.caption is not None
        if entry.caption is None and example is None:
            example = entry
        caption = entry.caption if isinstance(entry.caption, str) else _size(entry.caption)
        line = [entry.key, entry.source, entry.extension, caption, _size(entry.clip), entry.problem is None]
        digest.update(json.dumps(line).encode() + b"\n")
    return Listing(clips, captioned, digest.hexdigest()[:16], example)


def _size(place: Piece | None) -> int | None:
    """Bytes of a local file or of a member; nothing is asked of a remote store, which would take hours."""
    if place is None or place.path is None:
        return None if place is None else place.size
    try:
        return place.path.stat().st_size
    except (OSError, ValueError):  # a name with a zero byte is no path
        return -1  # what is missing is named as a fault when it is read


class Survey:
    """The journal of a survey.

    Args:
        folder: of the journal.
        settings: of the run; a journal of others is refused.

    Raises:
        ValueError: if the folder holds a journal of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        now = json.loads(json.dumps(settings))
        path = folder / "settings.json"
        if path.is_file():
            there = json.loads(path.read_text())
            if there != now:
                names = [name for name in sorted({*there, *now}) if there.get(name) != now.get(name)]
                changed = {name: (there.get(name), now.get(name)) for name in names}
                raise ValueError(
                    f"{folder.parent} was begun with other settings or another source (there, now): {changed}. "
                    "Choose another folder, or delete this one."
                )
        else:
            write_json(path, now)

    @property
    def finished(self) -> bool:
        """Whether every entry has its line."""
        return (self.folder / "done.json").is_file()

    def chunks(self) -> list[Path]:
        """Files of the journal, in order."""
        return sorted(self.folder.glob("[0-9]*.jsonl"))

    def rows(self) -> Iterator[tuple[int, int, Row]]:
        """(number of the file, offset in it, line) of every entry, in the order of the source."""
        for number, path in enumerate(self.chunks()):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    yield number, offset, json.loads(line)
                    offset += len(line)

    def row(self, chunk: int, offset: int) -> Row:
        """One line."""
        with self._path(chunk).open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.jsonl"

    def _kept(self, chunk: int) -> list[Row] | None:
        """Lines of a chunk that is done; None where some clip has to be asked for again."""
        try:
            rows = [json.loads(line) for line in self._path(chunk).read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return None
        return None if any(row.get("again") for row in rows) else rows

    def run(
        self, source: Source, rules: Rules, *, where: str, clips: int, processes: int, deadline: float, limit: float
    ) -> Iterator[int]:
        """Surveys what has no line yet; yields how many entries are done since the last time.

        Args:
            source: of the entries.
            rules: for each of them.
            where: what the source is called.
            clips: that the source lists.
            processes: that survey.
            deadline: seconds for each clip.
            limit: share of faults that stops the survey.

        Raises:
            ValueError: if more than `limit` of the clips are faults (`faults.jsonl` then has those that were found), or
                the source changed while it was read.
        """
        faults: list[Fault] = []
        listing = self.folder.parent / "faults.jsonl"
        drawn: deque[tuple[int, Entry, bool]] = deque()  # (chunk, entry, whether it ends its chunk)
        kept: deque[int] = deque()
        seen = 0

        def waiting() -> Iterator[Entry]:
            nonlocal seen
            entries = source.entries()
            chunk = 0
            while part := list(islice(entries, CHUNK)):
                seen += len(part)
                if (rows := self._kept(chunk)) is not None:
                    faults.extend(_faults(rows))
                    kept.append(len(part))
                else:
                    for index, entry in enumerate(part):
                        drawn.append((chunk, entry, index + 1 == len(part)))
                        yield entry
                chunk += 1

        rows: list[Row] = []
        with WorkerPool(processes, deadline) as workers:
            # Lines are small: one slow clip should not keep the others waiting.
            ahead = 32 * processes
            for result in workers.map(partial(survey_clip, rules=rules), waiting(), ahead=ahead):
                chunk, entry, last = drawn.popleft()
                row = _fault(entry, result.reason) if isinstance(result, Failure) else result
                rows.append(row)
                if "fault" in row:
                    faults.extend(_faults([row]))
                if last:
                    # ASCII: names of files may be what no UTF-8 is.
                    write_text(self._path(chunk), "".join(json.dumps(row) + "\n" for row in rows))
                    rows.clear()
                check_fault_share(faults, clips, limit, where, MEND, listing)
                yield 1 + _drain(kept)
        yield _drain(kept)
        check_fault_share(faults, clips, limit, where, MEND, listing)
        if seen != clips:
            raise ValueError(f"the source listed {clips} clips and then {seen}; expected one that does not change.")
        write_json(self.folder / "done.json", {"clips": clips})


def _drain(counts: deque[int]) -> int:
    return sum(counts.popleft() for _ in range(len(counts)))


def _faults(rows: list[Row]) -> list[Fault]:
    return [Fault(row["key"], row["fault"], row["shard"]) for row in rows if "fault" in row]
