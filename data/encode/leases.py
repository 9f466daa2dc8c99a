"""Leases: which process works on what, decided by files in a shared folder. No server and no network is needed.

A lease is a file that only one process can create. Its owner touches it at short intervals, the heartbeat. A lease
without a heartbeat has expired, and another process may take it over. Two owners of one lease waste work but never
damage it: an owner that has lost its lease drops its work, and what it finished before equals the other's result.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from data.encode.process_identity import pid_namespace, process_start
from data.files import temporaries, temporary_path


@dataclass(frozen=True)
class _LeaseState:
    """Content and time of the last heartbeat of a lease."""

    content: bytes
    touched: int  # ns, by the file system's clock

    @property
    def owner(self) -> dict[str, Any]:
        """What the lease says of its owner; empty if the owner was killed before it wrote."""
        with contextlib.suppress(ValueError):
            owner = json.loads(self.content)
            if isinstance(owner, dict):
                return owner
        return {}


class Leases:
    """Leases of this process in a folder; a context that sends heartbeats in a thread and releases them at its end.

    Args:
        folder: shared by all processes; made with the first lease.
        timeout: seconds without a heartbeat after which a lease has expired. It must be well above the time that the
            file system takes to show another host's heartbeat (a minute on NFS with its usual settings). The end of an
            owner on the same host is noticed at once.

    Raises:
        ValueError: for a timeout that is not positive.
    """

    def __init__(self, folder: Path, timeout: float = 120.0) -> None:
        if not timeout > 0:
            raise ValueError(f"got claim_timeout {timeout}, expected seconds above 0, for example 120.")
        self.folder, self.timeout = folder, timeout
        self._namespace = pid_namespace()
        # Name -> open file. Touching the open file never touches the file of a later owner.
        self._owned: dict[str, int] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)

    def __enter__(self) -> "Leases":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for name in list(self._owned):
            self.release(name)

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(self.timeout / 6):
            with self._lock:
                for file in self._owned.values():
                    with contextlib.suppress(OSError):  # another host took the lease over and removed the file
                        os.utime(file)

    def acquire(self, name: str) -> bool:
        """Tries to lease `name`, also by taking over an expired lease; true if this process owns it now.

        False for every name once the context has ended.
        """
        path = self.folder / name
        if self._stop.is_set():
            return False
        if self._create(path):
            return True
        state = self._read_state(path)
        if state is None or not self._has_expired(state):
            return False  # released just now, or owned
        with self._takeover_lock():
            return self._read_state(path) == state and self._remove_expired(path, state) and self._create(path)

    @contextlib.contextmanager
    def _takeover_lock(self) -> Iterator[None]:
        """One takeover at a time where the file system has locks; `_remove_expired` makes a race unlikely elsewhere."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, NotImplementedError):  # also filelock's Timeout
                stack.enter_context(FileLock(self.folder / ".lock", timeout=10))
            yield

    def write_once(self, name: str, content: str) -> str:
        """Writes `content` to the file `name` unless a process wrote it before; returns the file's complete content.

        Raises:
            OSError: if the folder cannot be written.
        """
        path = self.folder / name
        for _ in range(100):
            self._make_folder()
            temporary = temporary_path(path)
            # Another process may clear the folder between any two steps.
            with contextlib.suppress(FileNotFoundError):
                try:
                    temporary.write_text(content)
                    self._link_if_absent(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
                return path.read_text()
        raise OSError(errno.EBUSY, "it is removed again and again", str(path))

    def _link_if_absent(self, temporary: Path, path: Path) -> None:
        """Gives `temporary` the name `path` unless that exists: `atomic_file` would replace another process's file."""
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            with self._takeover_lock():
                if not path.exists():
                    os.replace(temporary, path)

    def owns(self, name: str) -> bool:
        """Whether this process still owns a lease: a slow process may have lost it."""
        file = self._owned.get(name)
        try:
            return file is not None and os.path.samestat(os.fstat(file), (self.folder / name).stat())
        except OSError:
            return False

    def release(self, name: str) -> None:
        """Ends a lease of this process."""
        if self.owns(name):
            (self.folder / name).unlink(missing_ok=True)
        with self._lock:
            file = self._owned.pop(name, None)
            if file is not None:
                os.close(file)

    def describe_owner(self, name: str) -> str | None:
        """The owner of a lease for a message; None if there is none."""
        state = self._read_state(self.folder / name)
        if state is None:
            return None
        owner = state.owner
        age = max(0.0, (self._now() - state.touched) / 1e9)
        job = f", job {owner['job']}" if owner.get("job") else ""
        return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job}, last seen {age:.0f} s ago"

    def remove(self, names: Iterable[str]) -> None:
        """Removes the files `names` and what belongs to no lease, then the folder if it is empty."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        leftovers = [*self.folder.glob(".*.expired"), *temporaries(self.folder)]
        for path in [*leftovers, self.folder / ".clock", self.folder / ".lock"]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process uses it now
            self.folder.rmdir()

    def remove_if_unused(self, name: str) -> None:
        """Removes the folder and the file `name` in it, unless another process has a lease there."""
        with contextlib.suppress(FileNotFoundError):
            if all(path.name == name or path.name.startswith(".") for path in self.folder.iterdir()):
                self.remove([name])

    def is_stale(self, path: Path) -> bool:
        """Whether a file was not touched for longer than the timeout; false if it is absent."""
        try:
            return self._now() - path.stat().st_mtime_ns > self.timeout * 1e9
        except FileNotFoundError:
            return False

    def _make_folder(self) -> None:
        # Another process may remove the folder while `mkdir` checks whether the path is a folder.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if self.folder.exists() and not self.folder.is_dir():
                raise

    def _create(self, path: Path) -> bool:
        self._make_folder()
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except (FileExistsError, FileNotFoundError):  # the latter if another process removed the folder
            return False
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())}
        job = " ".join(os.environ[n] for n in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if os.environ.get(n))
        content = {**owner, "place": self._namespace, "job": job, "token": uuid.uuid4().hex}
        os.write(file, json.dumps(content).encode())
        with self._lock:
            self._owned[path.name] = file
        return True

    def _read_state(self, path: Path) -> _LeaseState | None:
        # Opening the file makes a network file system ask its server; `stat` alone may use a cached answer.
        try:
            with path.open("rb") as file:
                return _LeaseState(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # another host removed it meanwhile
                return None
            raise

    def _has_expired(self, state: _LeaseState) -> bool:
        owner = state.owner
        if owner.get("place") == self._namespace and process_start(owner["pid"]) != owner["started"]:
            return True
        return self._now() - state.touched > self.timeout * 1e9

    def _now(self) -> int:
        """Time by the file system's clock, ns: the clocks of two hosts may differ by more than a timeout."""
        for _ in range(100):
            self._make_folder()
            with contextlib.suppress(FileNotFoundError), (self.folder / ".clock").open("a") as file:
                os.utime(file.fileno())
                return os.fstat(file.fileno()).st_mtime_ns
        raise OSError(errno.EBUSY, "it is removed again and again", str(self.folder))

    def _remove_expired(self, path: Path, state: _LeaseState) -> bool:
        """Removes an expired lease; false if another process did so first, or its owner has touched it."""
        renamed = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.expired")
        try:
            os.rename(path, renamed)
        except FileNotFoundError:
            return False
        unchanged = self._read_state(renamed) == state
        if not unchanged:
            # Another process removed the expired lease and created its own since `state` was read: give that one back.
            with contextlib.suppress(OSError):
                os.link(renamed, path)
        renamed.unlink(missing_ok=True)
        return unchanged
