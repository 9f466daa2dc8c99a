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
    """Ranges of remote files, each a file of its own; the longest unused go first.

    The bound holds to within a sixteenth of it for every process that writes: each looks at the whole folder only
    after it has added that much.

    Args:
        folder: made when something is put.
        limit: bytes.
    """

    folder: Path
    limit: int
    _added: int = field(default=0, init=False)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()[:40]
        return self.folder / digest[:2] / digest

    def get(self, name: str, size: int) -> bytes | None:
        """What was put under `name`, if it is there and has `size` bytes."""
        path = self._path(name)
        try:
            content = path.read_bytes()
            os.utime(path)  # its age is that of its last use
        except OSError:
            return None
        return content if len(content) == size else None

    def put(self, name: str, content: bytes) -> None:
        """Keeps `content`; a full disk only means that it is not kept."""
        if len(content) > self.limit // 4:
            return  # it would push out too much else
        try:
            with atomic_file(self._path(name), durable=False) as temporary:
                temporary.write_bytes(content)
        except OSError:
            return
        self._added += len(content)
        if self._added >= self.limit // 16:
            self._added = 0
            self._shrink()

    def _shrink(self) -> None:
        try:
            with FileLock(self.folder / "lock", timeout=0):
                self._drop_oldest()
        except Timeout:
            pass  # another process is at it

    def _drop_oldest(self) -> None:
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
