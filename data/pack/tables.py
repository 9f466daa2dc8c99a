"""Tables of clips and captions: CSV, JSON lines, Parquet; local or remote. A table is read row by row, never held."""

import csv
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NoReturn
from urllib.parse import urlsplit

from data.pack.entries import VIDEO_EXTENSIONS, Columns, Entry, Piece, make_key, printable, split_suffix
from data.storage.store import Store, check_location, is_remote, join

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
_BATCH = 1024  # rows of a Parquet file that are held at once
_LONGEST = 1 << 24  # of a CSV field, in characters

#: A row, or why it is none.
Row = dict[str, Any] | str


@dataclass(frozen=True)
class Table:
    """Clips and captions by rows.

    Args:
        location: of the table, path or URL.
        columns: names of its columns.
        store: that reads it.
    """

    location: str
    columns: Columns
    store: Store

    def entries(self) -> Iterator[Entry]:
        """One entry for each row.

        Raises:
            ValueError: if the table lacks a column, or is none.
            OSError: if it cannot be read.
        """
        suffix = split_suffix(urlsplit(self.location).path if is_remote(self.location) else self.location)[1]
        read = {"csv": self._csv, "jsonl": self._jsonl, "parquet": self._parquet}[suffix]
        with self.store.local(self.location) as path:
            for number, row in enumerate(read(path), start=1):
                yield self._entry(number, row)

    def _unknown(self, there: list[str]) -> NoReturn:
        raise ValueError(
            f"{self.location} has columns {there}, expected {self.columns.clip!r} and {self.columns.caption!r}; "
            "name yours with columns.clip and columns.caption."
        )

    def _check(self, there: list[str]) -> None:
        if not {self.columns.clip, self.columns.caption} <= set(there):
            self._unknown(there)

    def _csv(self, path: Path) -> Iterator[Row]:
        csv.field_size_limit(_LONGEST)
        # Bytes that are no UTF-8 become surrogates, and a fault of their row instead of the whole table's.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file, strict=True)  # a quote left open must not swallow the rest of the table
            try:
                self._check(list(rows.fieldnames or []))
                yield from rows
            except csv.Error as error:
                raise ValueError(f"{self.location} is not CSV at line {rows.line_num} ({error}); mend it.") from error

    def _jsonl(self, path: Path) -> Iterator[Row]:
        with path.open("rb") as file:
            rows = self._json_rows(file)
            # One row may lack a column, which is its own fault; a table in which none has both is another table.
            first = list(islice(rows, _BATCH))
            objects = [list(row) for row in first if isinstance(row, dict)]
            if objects and not any({self.columns.clip, self.columns.caption} <= set(names) for names in objects):
                self._unknown(objects[0])
            yield from first
            yield from rows

    def _json_rows(self, file: BinaryIO) -> Iterator[Row]:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                yield f"its row is not JSON ({error})"
                continue
            if not isinstance(row, dict):
                yield f"its row is a JSON {type(row).__name__}, expected an object"
                continue
            yield row

    def _parquet(self, path: Path) -> Iterator[Row]:
        try:
            import pyarrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError(f"{self.location} needs pyarrow; pip install 'reblock[parquet]'.") from error
        names = [self.columns.clip, self.columns.caption]
        try:
            with parquet.ParquetFile(path) as table:
                self._check(list(table.schema_arrow.names))
                for batch in table.iter_batches(batch_size=_BATCH, columns=names, use_threads=False):
                    # As binary: a text column may hold what is no UTF-8, which is that row's fault alone.
                    columns = [_values(batch.column(name), pyarrow) for name in names]
                    yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.location} is not Parquet ({error}); mend it.") from error

    def _entry(self, number: int, row: Row) -> Entry:
        place = f"row-{number:06d}"
        if isinstance(row, str):
            return Entry(place, place, self.location, problem=row)
        clip, caption = row.get(self.columns.clip), row.get(self.columns.caption)
        if not isinstance(clip, str) or not clip.strip():
            return Entry(place, place, self.location, problem=f"its {self.columns.clip} is {clip!r}, expected text")
        source = printable(clip.strip())
        try:
            location, name = self._resolve(clip.strip())
        except ValueError as error:
            return Entry(place, source, self.location, problem=str(error))
        stem, extension = split_suffix(name)
        key = make_key(stem)
        problem = None
        if extension and extension not in VIDEO_EXTENSIONS:
            problem = f"its clip ends in .{extension}, expected {', '.join(VIDEO_EXTENSIONS)}"
        elif caption is None:
            problem = f"no {self.columns.caption} in row {number}"
        elif not isinstance(caption, str):
            problem = f"its {self.columns.caption} is {caption!r}, expected text"
        elif printable(caption) != caption:
            problem = "its caption is not UTF-8"
        if problem:
            caption = None
        # What a URL answers often has no suffix; the container is known by its bytes, the name only labels it.
        return Entry(key, source, self.location, Piece(location), extension or "mp4", caption, problem=problem)

    def _resolve(self, clip: str) -> tuple[str, str]:
        """Location of a row's clip, and the path that its key is made of.

        Raises:
            ValueError: for a command or an unknown scheme; for a local file in a table from another machine.
        """
        check_location(clip)
        if is_remote(clip):
            parts = urlsplit(clip)
            if not parts.query:
                return clip, parts.path
            stem, extension = split_suffix(parts.path)
            # Two URLs may differ in their query alone.
            mark = hashlib.sha256(parts.query.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            return clip, f"{stem}-{mark}.{extension}" if extension else f"{stem}-{mark}"
        if is_remote(self.location):
            if clip.startswith(("/", "file:")) or ".." in clip.split("/"):
                raise ValueError(f"got {clip!r} in a table that is remote; expected a URL or a path inside its folder")
            return join(self.location.split("?")[0].rpartition("/")[0], clip), clip
        folder = Path(self.location.removeprefix("file://")).absolute().parent
        path = os.path.normpath(folder / clip.removeprefix("file://"))
        inside = os.path.relpath(path, folder) if path.startswith(f"{folder}{os.sep}") else path
        return path, inside


def _values(column: Any, pyarrow: Any) -> list[Any]:
    """Values of a column; text that is no UTF-8 with surrogates, as Python reads names of files."""
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return column.to_pylist()
    binary = pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()
    values = column.cast(binary).to_pylist()
    return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]
