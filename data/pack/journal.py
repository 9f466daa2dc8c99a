"""The journal of packing: what is known of every clip of a source, written while the clips are probed.

It lies in the folder `survey`. `settings.json` holds the settings of the run. `000000.jsonl`, ... hold a line for each
entry of the source, in its order, 256 lines a file (see `data.pack.probe_clip`). `done.json` exists when all lines do.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import write_json, write_text
from data.pack.probe_clip import JournalLine

#: Entries in one file of the journal: a killed run probes at most so many clips again.
CHUNK = 256


class ClipJournal:
    """The journal in a folder.

    Args:
        folder: of the journal.
        settings: of this run.

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

    def finish(self, clips: int) -> None:
        """Marks the journal as complete."""
        write_json(self.folder / "done.json", {"clips": clips})

    def lines(self) -> Iterator[tuple[int, int, JournalLine]]:
        """(number of the file, offset in it, line) of every entry, in the order of the source."""
        for number, path in enumerate(sorted(self.folder.glob("[0-9]*.jsonl"))):
            offset = 0
            with path.open("rb") as file:
                for line in file:
                    yield number, offset, json.loads(line)
                    offset += len(line)

    def line(self, chunk: int, offset: int) -> JournalLine:
        """The line at an offset of a file."""
        with self._path(chunk).open("rb") as file:
            file.seek(offset)
            return json.loads(file.readline())

    def read_chunk(self, chunk: int) -> list[JournalLine] | None:
        """The lines of a file; None if it is absent or one of its clips has to be probed again."""
        try:
            lines = [json.loads(line) for line in self._path(chunk).read_text(encoding="utf-8").splitlines()]
        except FileNotFoundError:
            return None
        return None if any(line.get("again") for line in lines) else lines

    def write_chunk(self, chunk: int, lines: Sequence[JournalLine]) -> None:
        """Writes a file of the journal."""
        # ASCII, because file names may hold lone surrogates.
        write_text(self._path(chunk), "".join(json.dumps(line) + "\n" for line in lines))

    def _path(self, chunk: int) -> Path:
        return self.folder / f"{chunk:06d}.jsonl"
