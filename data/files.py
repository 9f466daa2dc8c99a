"""Files that are complete or absent: written under a temporary name, forced to the disk, renamed.

Every file that Reblock writes goes through this module: a killed process or a power cut leaves the old file, the new
one or none, and at most a temporary file, which `temporaries` finds.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: What fsync of a folder answers on file systems that have none; the rename is then as durable as they make it.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


def temporary_path(path: Path) -> Path:
    """A hidden name next to `path`, different at every call and in every process: `.NAME.0123456789ab.part`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")


def temporaries(folder: Path, name: str = "*") -> list[Path]:
    """Files and folders in `folder` that have a temporary name: being written now, or left by a killed process.

    Args:
        folder: not searched in depth; may be absent.
        name: final name that they were to have; a pattern as for `Path.glob`.
    """
    return sorted(folder.glob(f".{name}.*.part"))


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_names(folder: Path) -> None:
    """Forces the names in a folder to the disk, where its file system can."""
    try:
        sync(folder)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise


@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yields a temporary path to write to; when the block ends, the file written there replaces `path`.

    If the block raises, `path` stays as it was and the temporary file is removed. The parent folder is made.

    Args:
        path: of the file.
        durable: force the file and its name to the disk. False is for what can be made again: a cache, a lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync_names(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill; when the block ends, it gets the name `path`, complete.

    If the block raises, the temporary folder is removed; so is what a killed process left of an earlier attempt.

    Raises:
        OSError: if `path` exists and is not an empty folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in temporaries(path.parent, path.name):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                sync(Path(folder, name))
            sync_names(Path(folder))
        os.replace(temporary, path)
        sync_names(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_bytes_once(path: Path, content: bytes) -> None:
    """Writes a file atomically unless it exists: of several writers at once, the first one's content stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content)
        sync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            if not path.exists():
                os.replace(temporary, path)
        sync_names(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, compact: bool = False) -> None:
    """Writes JSON atomically, indented by one space; `compact` without spaces, for what only programs read."""
    layout: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    write_text(path, json.dumps(value, ensure_ascii=False, **layout) + "\n")


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file, which is made if absent, and forces it to the disk.

    After a half line, left by a writer that was killed, the line begins on a new one.

    Args:
        path: of the file; its folder exists.
        line: without the line break.
    """
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        torn = bool(end) and (file.seek(end - 1), file.read(1))[1] != b"\n"
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_hash(settings: Mapping[str, Any]) -> str:
    """16 hex digits of settings, to know that a finished shard was made with the same ones."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
