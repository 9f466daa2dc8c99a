"""Captioned clips in a folder."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data.pack.entries import VIDEO_EXTENSIONS, ByteRange, ClipEntry, Columns, make_key, printable, split_suffix


@dataclass(frozen=True)
class FolderSource:
    """Clips of a folder and its subfolders, each with its caption beside it.

    Args:
        path: of the folder.
        columns: names of its captions.
    """

    path: Path
    columns: Columns

    def entries(self) -> Iterator[ClipEntry]:
        """One entry for each clip, in the order of their paths."""
        return self._walk(str(self.path.absolute()), "")

    def _walk(self, folder: str, relative: str) -> Iterator[ClipEntry]:
        with os.scandir(folder) as items:
            # A hidden file may be one that is still being written.
            by_name = {item.name: item for item in items if not item.name.startswith(".")}
        for name in sorted(by_name):
            item = by_name[name]
            if item.is_dir(follow_symlinks=False):
                yield from self._walk(item.path, f"{relative}{name}/")
            elif split_suffix(name)[1] in VIDEO_EXTENSIONS and not item.is_dir():
                yield self._entry(item, relative, by_name)

    def count_ignored(self) -> Counter[str]:
        """What is neither clip nor caption: number of files by extension, and number of linked folders."""
        counts: Counter[str] = Counter()
        used = (*VIDEO_EXTENSIONS, "json", split_suffix(f"a{self.columns.caption_suffix}")[1])
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            counts["linked folders"] += sum(os.path.islink(os.path.join(folder, name)) for name in subfolders)
            extensions = [split_suffix(name)[1] for name in names if not name.startswith(".")]
            counts.update(f"files .{printable(extension)}" for extension in extensions if extension not in used)
        return +counts

    def _entry(self, item: os.DirEntry[str], relative: str, by_name: dict[str, os.DirEntry[str]]) -> ClipEntry:
        stem, extension = split_suffix(item.name)
        key, source, shard = make_key(relative + stem), printable(relative + item.name), printable(str(self.path))
        clip = ByteRange(item.path)
        if not item.is_file():
            problem = "it is a link to nothing" if item.is_symlink() else "it is no regular file"
            return ClipEntry(key, source, shard, clip, extension, problem=problem)
        caption_name = stem + self.columns.caption_suffix
        for name in (caption_name, f"{stem}.json"):
            if name in by_name and by_name[name].is_file():
                field = self.columns.caption_field if name.endswith(".json") else None
                return ClipEntry(key, source, shard, clip, extension, ByteRange(by_name[name].path), field)
        return ClipEntry(key, source, shard, clip, extension, problem=f"no caption {printable(caption_name)}")
