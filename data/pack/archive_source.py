"""Captioned clips in webdataset archives."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

from data.files import atomic_file, write_json
from data.pack.entries import VIDEO_EXTENSIONS, ByteRange, ClipEntry, Columns, make_key, printable, split_suffix
from data.shards.archive import Member, Members, Scan, scan_tar
from data.storage.store import Store, is_pipe, is_remote, local_path


@dataclass(frozen=True)
class ArchiveSource:
    """Samples of webdataset archives, found by their headers.

    The headers of each archive are stored, so that a remote archive is read once for them. The output of a command is
    stored whole, because a command cannot be asked for a part of it.

    Args:
        locations: of the archives.
        columns: names of their captions.
        store: reads them.
        work: folder for what is stored.
    """

    locations: list[str]
    columns: Columns
    store: Store
    work: Path

    def entries(self) -> Iterator[ClipEntry]:
        """One entry for each sample, refused member and damaged archive, in the order of the archives."""
        stems = [split_suffix(_archive_name(location))[0] for location in self.locations]
        distinct = len(set(stems)) == len(stems) and not any(map(is_pipe, self.locations))
        for number, location in enumerate(self.locations):
            # Keys are unique only within an archive, so the key of a sample begins with its archive.
            prefix = "" if len(stems) == 1 else f"{stems[number] if distinct else f'{number:05d}'}/"
            yield from self._archive_entries(location, prefix)

    def _archive_entries(self, location: str, prefix: str) -> Iterator[ClipEntry]:
        name = printable(_archive_name(location))
        try:
            scan, path = self._scan(location)
        except (OSError, ValueError) as error:
            yield ClipEntry(make_key(name), name, location, problem=printable(str(error)))
            return
        for key, members in scan.samples:
            yield self._sample_entry(make_key(prefix + key), f"{name}/{printable(key)}", location, path, members)
        for member, why in scan.refused:
            yield ClipEntry(
                make_key(prefix + member), f"{name}/{printable(member)}", location, problem=f"refused: {why}"
            )
        if scan.damage:
            yield ClipEntry(make_key(name), name, location, problem=printable(f"the archive {scan.damage}"))

    def _sample_entry(self, key: str, source: str, shard: str, path: str, members: Members) -> ClipEntry:
        videos = [extension for extension in members if extension in VIDEO_EXTENSIONS]
        if len(videos) != 1:
            problem = f"it has members {sorted(members)}, expected one of {', '.join(VIDEO_EXTENSIONS)}"
            return ClipEntry(key, source, shard, problem=printable(problem))
        extension = videos[0]
        clip = _byte_range(path, members[extension])
        source = f"{source}.{extension}"
        caption_name = self.columns.caption_suffix.lstrip(".").lower()
        for name in (caption_name, "json"):
            if name in members:
                field = self.columns.caption_field if name.endswith("json") else None
                return ClipEntry(key, source, shard, clip, extension, _byte_range(path, members[name]), field)
        problem = printable(f"no caption: it has members {sorted(members)}, expected {caption_name} or json")
        return ClipEntry(key, source, shard, clip, extension, problem=problem)

    def _scan(self, location: str) -> tuple[Scan, str]:
        """The contents of an archive, and the path or URL of its bytes."""
        pipe = is_pipe(location)
        name = hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        path = str((self.work / f"{name}.tar").absolute()) if pipe else location
        if pipe and not Path(path).is_file():
            self._store_output(location, Path(path))
        stamp = [self.store.size(path)]
        if stamp[0] is None:
            raise FileNotFoundError(f"{location} does not exist")
        if not is_remote(path):
            stamp.append(local_path(path).stat().st_mtime_ns)
        stored = self.work / f"{name}.json"
        if (scan := _read_scan(stored, stamp)) is None:
            with self.store.local(path) as local:
                scan = scan_tar(local)
            write_json(stored, {"stamp": stamp, "location": printable(location), "scan": asdict(scan)}, compact=True)
        return scan, path

    def _store_output(self, command: str, path: Path) -> None:
        with atomic_file(path) as temporary, self.store.local(command, allow_pipe=True) as copy:
            shutil.copyfile(copy, temporary)


def _archive_name(location: str) -> str:
    """The file name of an archive; for a command, the command itself."""
    if is_pipe(location):
        return location.removeprefix("pipe:").strip()
    return (urlsplit(location).path if is_remote(location) else location).rpartition("/")[2]


def _byte_range(location: str, member: Member) -> ByteRange:
    return ByteRange(location, member.offset, member.size)


def _read_scan(path: Path, stamp: list[int | None]) -> Scan | None:
    """The stored contents of an archive; None if the archive has changed since."""
    try:
        stored = json.loads(path.read_text())
        if stored["stamp"] != stamp:
            return None
        scan = stored["scan"]
        samples = [(key, {e: Member(**m) for e, m in members.items()}) for key, members in scan["samples"]]
        return Scan(samples, [(name, why) for name, why in scan["refused"]], scan["damage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
