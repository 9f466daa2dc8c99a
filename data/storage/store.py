"""Reads local files and, through fsspec, `s3://`, `gs://`, `http(s)://` and other URLs.

A location is a string, a path or a URL. Remote files are read by byte ranges, with retries and exponential backoff, and
cached in a bounded local folder if one is given.
"""

import asyncio
import contextlib
import glob
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import tenacity
from aiohttp import ClientError, ClientResponseError
from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]

from data.storage.byte_cache import ByteCache

T = TypeVar("T")

#: Schemes of the URLs that are read; others are refused.
SCHEMES = ("file", "http", "https", "s3", "gs", "gcs", "az", "abfs", "hf", "memory")
#: HTTP statuses after which a request is retried: time-out, too many requests, failures of the server.
_RETRIED_STATUSES = (408, 425, 429, 500, 502, 503, 504)


class StoreError(OSError):
    """A remote file cannot be read: every attempt failed, or retrying is pointless."""


def _scheme(location: str) -> str | None:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", location)
    return match.group(1).lower() if match else None


def is_remote(location: str) -> bool:
    """Whether a location is on another machine; `file://` is not."""
    return _scheme(location) not in (None, "file")


def is_pipe(location: str) -> bool:
    """Whether a location is a command whose output is to be read."""
    return location.startswith(("pipe:", "|")) or location.rstrip().endswith("|")


def check_location(location: str, *, allow_pipe: bool | None = None) -> None:
    """Refuses commands, chains of file systems, and unknown schemes.

    Args:
        location: path, URL or command.
        allow_pipe: whether a command is accepted; None where no flag can allow it.

    Raises:
        ValueError: for a command that was not allowed, a chain of file systems, or an unknown scheme.
    """
    if is_pipe(location):
        if not allow_pipe:
            advice = "" if allow_pipe is None else ", or --allow_pipe true if you trust where this name comes from"
            raise ValueError(f"got {location!r}, a command; data are never code. Give a path or URL{advice}.")
        return
    scheme = _scheme(location)
    if "::" in location and scheme != "file":
        raise ValueError(f"got {location!r}, a chain of file systems; expected one path or URL.")
    if scheme is not None and scheme not in SCHEMES:
        raise ValueError(f"got {location!r}, expected a path or a URL of {', '.join(SCHEMES)}.")


def local_path(location: str) -> Path:
    """The path of a location that is not remote."""
    return Path(location.removeprefix("file://"))


def join(folder: str, *names: str) -> str:
    """A location inside a folder."""
    return "/".join([folder.rstrip("/"), *names]) if folder != "/" else "/" + "/".join(names)


def expand(location: str) -> list[str]:
    """Locations that a name with braces or wildcards stands for; braces in their order, wildcards sorted.

    Raises:
        ValueError: if braces do not pair, or wildcards match nothing.
    """
    check_location(location)
    try:
        named = list(braceexpand(location))
    except UnbalancedBracesError as error:
        raise ValueError(f"got {location!r}, its braces do not pair; expected for example a-{{000..009}}.") from error
    found: list[str] = []
    for name in named:
        # A query of an http URL holds a question mark that is no wildcard.
        if not glob.has_magic(name) or _scheme(name) in ("http", "https"):
            found.append(name)
            continue
        if is_remote(name):
            system, path = _file_system(name)
            matches = sorted(str(system.unstrip_protocol(str(m))) for m in system.glob(path))
        else:
            matches = sorted(glob.glob(str(local_path(name)), recursive=True))
        if not matches:
            raise ValueError(f"{name} matches nothing; expected shards or folders there.")
        found += matches
    return found


def _file_system(location: str) -> tuple[Any, str]:
    """The file system of a location (one per process: none survives a fork) and the path in it."""
    try:
        return fsspec.core.url_to_fs(location)
    except ImportError as error:
        raise ValueError(
            f"{location} needs a package that is not installed ({error}); pip install 'reblock[remote]'."
        ) from error


def _is_absent(error: BaseException | None) -> bool:
    """Whether an error means that there is no such file: fsspec raises FileNotFoundError for any failed request."""
    cause = error.__cause__ if error else None
    failed_request = isinstance(cause, (ClientError, asyncio.TimeoutError))
    not_found = isinstance(cause, ClientResponseError) and cause.status in (404, 410)
    return isinstance(error, FileNotFoundError) and (not failed_request or not_found)


def _is_transient(error: BaseException) -> bool:
    """Whether a request that failed so is worth a retry."""
    if isinstance(error, FileNotFoundError) and not _is_absent(error):
        return error.__cause__ is not None and _is_transient(error.__cause__)
    if isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)):
        return False
    if isinstance(error, ClientResponseError):
        return error.status in _RETRIED_STATUSES
    return isinstance(error, (OSError, ClientError, asyncio.TimeoutError, EOFError))


class Store:
    """Reads bytes from locations; can be pickled for other processes.

    Args:
        cache: folder that caches remote files; None caches nothing.
        cache_bytes: upper bound of the cache.
        attempts: of a remote read, the first included.
        backoff: seconds before the second attempt; the pause doubles, up to a minute, with jitter.

    Raises:
        ValueError: for a bound or attempts below 1.
    """

    def __init__(
        self, cache: Path | str | None = None, cache_bytes: int = 64 << 30, attempts: int = 6, backoff: float = 1.0
    ) -> None:
        if cache_bytes < 1 or attempts < 1:
            raise ValueError(f"got cache_bytes {cache_bytes}, attempts {attempts}; expected at least 1 of each.")
        self._cache = None if cache is None else ByteCache(Path(cache), cache_bytes)
        self._attempts = attempts
        self._backoff = backoff

    def read(self, location: str, offset: int = 0, size: int | None = None, *, version: str = "") -> bytes:
        """Bytes of a file, from the cache if it holds them in this version.

        Args:
            location: of the file.
            offset: first byte.
            size: number of bytes; None reads to the end, never from the cache.
            version: of the file, for example its checksum; without one the cache is not used, since another file may
                have this name by now.

        Raises:
            ValueError: if the file ends before.
            OSError: if it cannot be read; `StoreError` for what is remote.
        """
        if not is_remote(location):
            with local_path(location).open("rb") as file:
                file.seek(offset)
                return _of_length(file.read(-1 if size is None else size), location, offset, size)
        name = f"{location} {version} {offset} {size}"
        cached = self._cache if version and size is not None else None
        if cached and size is not None and (content := cached.get(name, size)) is not None:
            return content

        def request() -> bytes:
            system, path = _file_system(location)
            end = None if size is None else offset + size
            return system.cat_file(path, start=offset or None, end=end)

        content = _of_length(self._retry(location, request), location, offset, size)
        if cached:
            cached.put(name, content)
        return content

    def size(self, location: str) -> int | None:
        """Bytes of a file; None if it is absent.

        Raises:
            StoreError: if a store does not answer.
        """
        if not is_remote(location):
            path = local_path(location)
            return path.stat().st_size if path.is_file() else None
        try:
            return int(
                self._retry(location, lambda: _file_system(location)[0].info(_file_system(location)[1])["size"] or 0)
            )
        except StoreError as error:
            if _is_absent(error.__cause__):
                return None
            raise

    def exists(self, location: str) -> bool:
        """Whether there is a file.

        Raises:
            StoreError: if a store does not answer.
        """
        return self.size(location) is not None

    @contextlib.contextmanager
    def local(self, location: str, *, allow_pipe: bool = False) -> Iterator[Path]:
        """A whole file on this machine: itself, or a copy that is removed afterwards.

        Raises:
            ValueError: for a command that was not allowed.
            OSError: if it cannot be read.
        """
        check_location(location, allow_pipe=allow_pipe)
        if not is_pipe(location) and not is_remote(location):
            yield local_path(location)
            return
        with tempfile.TemporaryDirectory(prefix="reblock-") as folder:
            copy = Path(folder) / "copy"
            if is_pipe(location):
                _run_command(location, copy)
            else:
                self._retry(location, lambda: _file_system(location)[0].get_file(_file_system(location)[1], str(copy)))
            yield copy

    def _retry(self, location: str, act: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_random_exponential(multiplier=self._backoff, max=60),
            retry=tenacity.retry_if_exception(_is_transient),
            reraise=True,
        )
        try:
            return retrying(act)
        except ValueError:
            raise
        except Exception as error:
            tries = retrying.statistics.get("attempt_number", 1)
            said = str(error).strip() or type(error).__name__
            raise StoreError(f"{location} cannot be read after {tries} attempt(s): {said}") from error


def _of_length(content: bytes, location: str, offset: int, size: int | None) -> bytes:
    if size is not None and len(content) < size:
        raise ValueError(f"{location} ends at byte {offset + len(content)}, expected {offset + size}: it is cut short")
    if size is not None and len(content) > size:
        raise ValueError(f"{location} gave {len(content)} bytes for a range of {size}: its server ignores ranges")
    return content


def _run_command(location: str, copy: Path) -> None:
    """The output of a command, started without a shell."""
    words = shlex.split(location.removeprefix("pipe:").strip().strip("|"))
    with copy.open("wb") as file:
        done = subprocess.run(words, stdout=file, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=os.environ)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it says nothing"]
        raise StoreError(f"{location} ended with {done.returncode}: {said[0]}")
