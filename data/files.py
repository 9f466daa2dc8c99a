"""Writing files so that they are whole or absent."""

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def beside(path: Path) -> Path:
    """A hidden name next to `path`, of its own for every process on every machine."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def put_in_place(part: Path, path: Path) -> None:
    """Forces `part` to the disk and renames it to `path`: after a power cut, `path` is whole, old or absent."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """Writes text beside `path`, forces it to the disk and renames it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = beside(path)
    try:
        part.write_text(text, encoding="utf-8")
        put_in_place(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Writes JSON like `write_text`; `compact` without spaces, for what no one reads."""
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    write_text(path, json.dumps(value, ensure_ascii=False, **layout) + "\n")


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_hash(settings: Mapping[str, Any]) -> str:
    """A short name for settings, to know that a finished shard was made with the same ones."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
