"""A bounded folder of remote bytes on this machine, shared by any number of processes."""

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from data.files import atomic_file


@dataclass
class ByteCache:
    """Ranges of remote files, one file each; evicts the least recently used.

    Every process that writes may exceed the limit by a sixteenth of it: it measures the folder only after it has added
    that much.

    Args:
        folder: of the cache; made at the first `put`.
        limit: bytes.
    """

    folder: Path
    limit: int
    _added: int = field(default=0, init=False)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self.folder / digest[:2] / digest

    def get(self, name: str, size: int) -> bytes | None:
        """The content that is cached under `name`; None if there is none of `size` bytes."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # eviction goes by the time of the last use
        except OSError:
            return None
        return content if len(content) == size else None

    def put(self, name: str, content: bytes) -> None:
        """Caches `content`, unless it cannot be written: a full disk is no error."""
        if len(content) > self.limit // 4:
            return  # it would evict too much else
        try:
            with atomic_file(self._path(name), durable=False) as temporary:
                temporary.write_bytes(content)
        except OSError:
            return
        self._added += len(content)
        if self._added >= self.limit // 16:
            self._added = 0
            self._evict()

    def _evict(self) -> None:
        try:
            with FileLock(self.folder / "lock", timeout=0):
                self._remove_oldest()
        except Timeout:
            pass  # another process evicts

    def _remove_oldest(self) -> None:
        found = []
        for path in self.folder.glob("??/*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                found.append((facts.st_mtime_ns, facts.st_size, path))
        excess = sum(size for _, size, _ in found) - self.limit * 15 // 16
        for _, size, path in sorted(found, key=lambda entry: entry[0]):
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                excess -= size
