"""Where captioned clips come from: folders, tables, webdataset archives. Each clip becomes an `Entry`; none is read.

A source is walked, never held: a listing of millions of clips takes no memory. Walked again it gives the same entries
in the same order.
"""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from braceexpand import braceexpand

from data.files import atomic_file, write_json
from data.pack.entries import VIDEO_EXTENSIONS, Columns, Entry, Piece, make_key, printable, split_suffix
from data.pack.tables import TABLE_SUFFIXES, Table
from data.shards.archive import Member, Members, Scan, scan_tar
from data.storage.store import Store, check_location, expand, is_pipe, is_remote, local_path


class Source(Protocol):
    """Captioned clips in an order that does not change."""

    def entries(self) -> Iterator[Entry]:
        """All clips of the source, and what is there in place of one."""


def open_source(location: str, columns: Columns, store: Store, work: Path, *, allow_pipe: bool = False) -> Source:
    """The source at a location.

    Args:
        location: folder; table; archive, also by braces or wildcards; command, if allowed.
        columns: names of captions and clips in it.
        store: that reads it.
        work: folder for what is known about archives, and for the output of commands.
        allow_pipe: whether a command is run.

    Raises:
        ValueError: if there is nothing that can be read.
    """
    check_location(location, allow_pipe=allow_pipe)
    if is_pipe(location):
        return Archives(list(braceexpand(location)), columns, store, work)
    if not is_remote(location) and local_path(location).is_dir():
        return Folder(local_path(location), columns)
    name = urlsplit(location).path if is_remote(location) else location
    if name.lower().endswith(TABLE_SUFFIXES) and (is_remote(location) or local_path(location).is_file()):
        return Table(location, columns, store)
    if name.lower().endswith(".tar"):
        found = expand(location)
        if any(is_remote(archive) or local_path(archive).is_file() for archive in found):
            return Archives(found, columns, store, work)
    raise ValueError(
        f"{location} is neither a folder of clips and captions, nor a table ({', '.join(TABLE_SUFFIXES)}), "
        "nor webdataset archives (.tar, also with braces or wildcards)."
    )


@dataclass(frozen=True)
class Folder:
    """Clips of a folder, searched in depth, each with its caption beside it.

    Args:
        path: of the folder.
        columns: what its captions are called.
    """

    path: Path
    columns: Columns

    def entries(self) -> Iterator[Entry]:
        """One entry for each clip, in the order of their paths."""
        return self._walk(str(self.path.absolute()), "")

    def _walk(self, folder: str, inside: str) -> Iterator[Entry]:
        with os.scandir(folder) as found:
            # What is hidden may be still being written.
            there = {item.name: item for item in found if not item.name.startswith(".")}
        for name in sorted(there):
            item = there[name]
            if item.is_dir(follow_symlinks=False):
                yield from self._walk(item.path, f"{inside}{name}/")
            elif split_suffix(name)[1] in VIDEO_EXTENSIONS and not item.is_dir():
                yield self._entry(item, inside, there)

    def overlooked(self) -> Counter[str]:
        """What is in the folder and is neither clip nor caption: how many files of each ending, and linked folders."""
        counts: Counter[str] = Counter()
        endings = (*VIDEO_EXTENSIONS, "json", split_suffix(f"a{self.columns.caption_suffix}")[1])
        for folder, inside, names in os.walk(self.path):
            inside[:] = [name for name in inside if not name.startswith(".")]
            counts["linked folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in inside)
            found = [split_suffix(name)[1] for name in names if not name.startswith(".")]
            counts.update(f"files .{printable(ending)}" for ending in found if ending not in endings)
        return +counts

    def _entry(self, item: os.DirEntry[str], inside: str, there: dict[str, os.DirEntry[str]]) -> Entry:
        stem, extension = split_suffix(item.name)
        key, source, shard = make_key(inside + stem), printable(inside + item.name), printable(str(self.path))
        clip = Piece(item.path)
        if not item.is_file():
            problem = "it is a link to nothing" if item.is_symlink() else "it is no regular file"
            return Entry(key, source, shard, clip, extension, problem=problem)
        named = stem + self.columns.caption_suffix
        for name in (named, f"{stem}.json"):
            if name in there and there[name].is_file():
                field = self.columns.caption_field if name.endswith(".json") else None
                return Entry(key, source, shard, clip, extension, Piece(there[name].path), field)
        return Entry(key, source, shard, clip, extension, problem=f"no caption {printable(named)}")


@dataclass(frozen=True)
class Archives:
    """Samples of webdataset archives, read by their headers.

    What the headers say is kept, so that a remote archive is fetched for them once; the output of a command is kept
    whole, since no part of it can be asked for.

    Args:
        locations: of the archives.
        columns: what their captions are called.
        store: that reads them.
        work: folder for what is kept.
    """

    locations: list[str]
    columns: Columns
    store: Store
    work: Path

    def entries(self) -> Iterator[Entry]:
        """One entry for each sample, refused member and damaged archive, in the order of the archives."""
        stems = [split_suffix(_name(location))[0] for location in self.locations]
        apart = len(set(stems)) == len(stems) and not any(map(is_pipe, self.locations))
        for number, location in enumerate(self.locations):
            # Keys need only differ inside an archive, so that several may hold the same ones.
            prefix = "" if len(stems) == 1 else f"{stems[number] if apart else f'{number:05d}'}/"
            yield from self._archive(location, prefix)

    def _archive(self, location: str, prefix: str) -> Iterator[Entry]:
        name = printable(_name(location))
        try:
            scan, place = self._scan(location)
        except (OSError, ValueError) as error:
            yield Entry(make_key(name), name, location, problem=printable(str(error)))
            return
        for key, members in scan.samples:
            yield self._sample(make_key(prefix + key), f"{name}/{printable(key)}", location, place, members)
        for member, why in scan.refused:
            yield Entry(make_key(prefix + member), f"{name}/{printable(member)}", location, problem=f"refused: {why}")
        if scan.damage:
            yield Entry(make_key(name), name, location, problem=printable(f"the archive {scan.damage}"))

    def _sample(self, key: str, source: str, shard: str, place: str, members: Members) -> Entry:
        videos = [extension for extension in members if extension in VIDEO_EXTENSIONS]
        if len(videos) != 1:
            problem = f"it has members {sorted(members)}, expected one of {', '.join(VIDEO_EXTENSIONS)}"
            return Entry(key, source, shard, problem=printable(problem))
        extension = videos[0]
        clip = _piece(place, members[extension])
        source = f"{source}.{extension}"
        named = self.columns.caption_suffix.lstrip(".").lower()
        for name in (named, "json"):
            if name in members:
                field = self.columns.caption_field if name.endswith("json") else None
                return Entry(key, source, shard, clip, extension, _piece(place, members[name]), field)
        problem = printable(f"no caption: it has members {sorted(members)}, expected {named} or json")
        return Entry(key, source, shard, clip, extension, problem=problem)

    def _scan(self, location: str) -> tuple[Scan, str]:
        """What an archive's headers say, and where its bytes are read from."""
        pipe = is_pipe(location)
        name = hashlib.sha256(location.encode("utf-8", "surrogateescape")).hexdigest()[:16]
        place = str((self.work / f"{name}.tar").absolute()) if pipe else location
        if pipe and not Path(place).is_file():
            self._fetch(location, Path(place))
        stamp = [self.store.size(place)]
        if stamp[0] is None:
            raise FileNotFoundError(f"{location} does not exist")
        if not is_remote(place):
            stamp.append(local_path(place).stat().st_mtime_ns)
        kept = self.work / f"{name}.json"
        if (scan := _read_scan(kept, stamp)) is None:
            with self.store.local(place) as path:
                scan = scan_tar(path)
            write_json(kept, {"stamp": stamp, "location": printable(location), "scan": asdict(scan)}, compact=True)
        return scan, place

    def _fetch(self, command: str, path: Path) -> None:
        with atomic_file(path) as temporary, self.store.local(command, allow_pipe=True) as copy:
            shutil.copyfile(copy, temporary)


def _name(location: str) -> str:
    """The file name of an archive; a command's own words for its output."""
    if is_pipe(location):
        return location.removeprefix("pipe:").strip()
    return (urlsplit(location).path if is_remote(location) else location).rpartition("/")[2]


def _piece(location: str, member: Member) -> Piece:
    return Piece(location, member.offset, member.size)


def _read_scan(path: Path, stamp: list[int | None]) -> Scan | None:
    """What was kept about an archive; None if it is another one by now."""
    try:
        kept = json.loads(path.read_text())
        if kept["stamp"] != stamp:
            return None
        scan = kept["scan"]
        samples = [(key, {e: Member(**m) for e, m in members.items()}) for key, members in scan["samples"]]
        return Scan(samples, [(name, why) for name, why in scan["refused"]], scan["damage"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
