"""Captioned clips in tables: CSV, JSON lines, Parquet; local or remote. Tables are read row by row, never whole."""

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

from data.pack.entries import VIDEO_EXTENSIONS, ByteRange, ClipEntry, Columns, make_key, printable, split_suffix
from data.storage.store import Store, check_location, is_remote, join

TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
_BATCH = 1024  # rows of a Parquet file in memory at once
_MAX_FIELD = 1 << 24  # characters of a CSV field

#: A row, or the problem with it.
_TableRow = dict[str, Any] | str


@dataclass(frozen=True)
class TableSource:
    """Clips and captions of the rows of a table.

    Args:
        location: of the table, path or URL.
        columns: names of its columns.
        store: reads it.
    """

    location: str
    columns: Columns
    store: Store

    def entries(self) -> Iterator[ClipEntry]:
        """One entry for each row.

        Raises:
            ValueError: if the table lacks a column or is damaged.
            OSError: if it cannot be read.
        """
        suffix = split_suffix(urlsplit(self.location).path if is_remote(self.location) else self.location)[1]
        read = {"csv": self._csv, "jsonl": self._jsonl, "parquet": self._parquet}[suffix]
        with self.store.local(self.location) as path:
            for number, row in enumerate(read(path), start=1):
                yield self._entry(number, row)

    def _refuse(self, names: list[str]) -> NoReturn:
        raise ValueError(
            f"{self.location} has columns {names}, expected {self.columns.clip!r} and {self.columns.caption!r}; "
            "name yours with columns.clip and columns.caption."
        )

    def _check(self, names: list[str]) -> None:
        if not {self.columns.clip, self.columns.caption} <= set(names):
            self._refuse(names)

    def _csv(self, path: Path) -> Iterator[_TableRow]:
        csv.field_size_limit(_MAX_FIELD)
        # Bytes that are not UTF-8 become surrogates: a fault of their row instead of the whole table.
        with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            rows = csv.DictReader(file, strict=True)  # an unclosed quote must not include the rest of the table
            try:
                self._check(list(rows.fieldnames or []))
                yield from rows
            except csv.Error as error:
                raise ValueError(f"{self.location} is not CSV at line {rows.line_num} ({error}); mend it.") from error

    def _jsonl(self, path: Path) -> Iterator[_TableRow]:
        with path.open("rb") as file:
            rows = self._json_rows(file)
            # A row may lack a column, which is a fault of that row. If no row has both, the table has other columns.
            first = list(islice(rows, _BATCH))
            objects = [list(row) for row in first if isinstance(row, dict)]
            if objects and not any({self.columns.clip, self.columns.caption} <= set(names) for names in objects):
                self._refuse(objects[0])
            yield from first
            yield from rows

    def _json_rows(self, file: BinaryIO) -> Iterator[_TableRow]:
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

    def _parquet(self, path: Path) -> Iterator[_TableRow]:
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
                    # As binary: text that is not UTF-8 is a fault of its row, not of the whole column.
                    columns = [_values(batch.column(name), pyarrow) for name in names]
                    yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.location} is not Parquet ({error}); mend it.") from error

    def _entry(self, number: int, row: _TableRow) -> ClipEntry:
        row_name = f"row-{number:06d}"
        if isinstance(row, str):
            return ClipEntry(row_name, row_name, self.location, problem=row)
        clip, caption = row.get(self.columns.clip), row.get(self.columns.caption)
        if not isinstance(clip, str) or not clip.strip():
            return ClipEntry(
                row_name, row_name, self.location, problem=f"its {self.columns.clip} is {clip!r}, expected text"
            )
        source = printable(clip.strip())
        try:
            location, name = self._resolve(clip.strip())
        except ValueError as error:
            return ClipEntry(row_name, source, self.location, problem=str(error))
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
        # URLs often have no suffix. Readers recognise the container by its bytes, so the extension is only a label.
        return ClipEntry(key, source, self.location, ByteRange(location), extension or "mp4", caption, problem=problem)

    def _resolve(self, clip: str) -> tuple[str, str]:
        """Location of a row's clip, and the path from which its key is made.

        Raises:
            ValueError: for a command or an unknown scheme, and for a local file in a remote table.
        """
        check_location(clip)
        if is_remote(clip):
            parts = urlsplit(clip)
            if not parts.query:
                return clip, parts.path
            stem, extension = split_suffix(parts.path)
            # Two URLs may differ only in their query.
            digest = hashlib.sha256(parts.query.encode("utf-8", "surrogateescape")).hexdigest()[:8]
            return clip, f"{stem}-{digest}.{extension}" if extension else f"{stem}-{digest}"
        if is_remote(self.location):
            if clip.startswith(("/", "file:")) or ".." in clip.split("/"):
                raise ValueError(f"got {clip!r} in a table that is remote; expected a URL or a path inside its folder")
            return join(self.location.split("?")[0].rpartition("/")[0], clip), clip
        folder = Path(self.location.removeprefix("file://")).absolute().parent
        path = os.path.normpath(folder / clip.removeprefix("file://"))
        relative = os.path.relpath(path, folder) if path.startswith(f"{folder}{os.sep}") else path
        return path, relative


def _values(column: Any, pyarrow: Any) -> list[Any]:
    """Values of a column; bytes that are not UTF-8 become surrogates, as in Python's file names."""
    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        return column.to_pylist()
    binary = pyarrow.large_binary() if pyarrow.types.is_large_string(kind) else pyarrow.binary()
    values = column.cast(binary).to_pylist()
    return [value if value is None else value.decode("utf-8", "surrogateescape") for value in values]
