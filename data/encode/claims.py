"""Which process works on what, agreed on through files of one shared folder: no server, no network.

A claim is a file that only one process can create. Its owner touches it at short intervals; a claim that nobody
touches any more is dead and may be taken over. Two owners of one thing are never wrong, only wasteful: whoever finds
its claim lost gives its work up, and what it had put in place before is what the other would have written.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from data.files import temporary_path

_GOLDEN = 0.6180339887498949


def _read_line(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""


def _place() -> str:
    """Where a process id means this process: the host since its last start, and the container."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return " ".join([socket.gethostname(), _read_line("/proc/sys/kernel/random/boot_id"), namespace])


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in the kernel's own count; None if it is gone or only waits to be reaped.

    Where there is no /proc, "?" for every process that is there.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "?"
    # The name in parentheses may hold anything; state is the first field behind it, the start the twentieth.
    fields = _read_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def start_position(count: int, environment: Mapping[str, str] = os.environ) -> int:
    """Where in `count` things a process begins, so that processes meet late: its number within the job, spread out.

    The number is that of the SLURM array task and of the rank in it, else the process id.
    """

    def number(*names: str) -> int | None:
        return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)

    task, rank = number("SLURM_ARRAY_TASK_ID"), number("RANK", "SLURM_PROCID")
    ranks = number("WORLD_SIZE", "SLURM_NTASKS") or 1
    own = os.getpid() if task is None and rank is None else (task or 0) * ranks + (rank or 0)
    # Multiples of the golden ratio cut a circle evenly, however many there will be.
    return int(count * (own * _GOLDEN % 1.0))


@dataclass(frozen=True)
class _Seen:
    """A claim as it was found."""

    content: bytes
    touched: int  # ns, by the file system's clock

    @property
    def owner(self) -> dict[str, Any]:
        """What it says; empty if its owner was killed before it wrote a word."""
        with contextlib.suppress(ValueError):
            said = json.loads(self.content)
            if isinstance(said, dict):
                return said
        return {}


class Claims:
    """Claims of this process in a folder; a context that touches them in a thread and gives them back at its end.

    Args:
        folder: shared by all processes; made when something is claimed.
        timeout: seconds without a touch after which a claim is dead. Well above what the file system takes to show
            another host's touch (a minute on NFS with its usual settings). The owner's death is seen at once from
            the same host.

    Raises:
        ValueError: for a timeout that is not positive.
    """

    def __init__(self, folder: Path, timeout: float = 120.0) -> None:
        if not timeout > 0:
            raise ValueError(f"got claim_timeout {timeout}, expected seconds above 0, for example 120.")
        self.folder, self.timeout = folder, timeout
        self._place = _place()
        self._held: dict[str, int] = {}  # name -> open file: touching it never touches a successor's claim
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)

    def __enter__(self) -> "Claims":
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)

    def _beat(self) -> None:
        while not self._stop.wait(self.timeout / 6):
            with self._lock:
                for file in self._held.values():
                    with contextlib.suppress(OSError):  # taken over and removed by another host
                        os.utime(file)

    def take(self, name: str) -> bool:
        """Claims `name`; true if it is this process's now. A dead claim is taken over.

        Nothing is claimed any more once the context has ended.
        """
        path = self.folder / name
        if self._stop.is_set():
            return False
        if self._create(path):
            return True
        seen = self._look(path)
        if seen is None or not self._is_dead(seen):
            return False  # given back just now, or alive
        with self._one_at_a_time():
            return self._look(path) == seen and self._bury(path, seen) and self._create(path)

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Take-overs one after another where the file system has locks; `_bury` is nearly sure where it has none."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError, NotImplementedError):  # among them filelock's Timeout
                stack.enter_context(FileLock(self.folder / ".lock", timeout=10))
            yield

    def first_word(self, name: str, content: str) -> str:
        """What the first process wrote under `name`, whole; this one writes `content` if it is the first.

        Raises:
            OSError: if the folder cannot be written.
        """
        path = self.folder / name
        for _ in range(100):
            self._make_folder()
            part = temporary_path(path)
            # Another process may clear the folder between any two steps.
            with contextlib.suppress(FileNotFoundError):
                try:
                    part.write_text(content)
                    self._put_first(part, path)
                finally:
                    part.unlink(missing_ok=True)
                return path.read_text()
        raise OSError(errno.EBUSY, "it is removed again and again", str(path))

    def _put_first(self, part: Path, path: Path) -> None:
        """Gives a file its name unless another has it."""
        try:
            os.link(part, path)
        except FileExistsError:
            return
        except FileNotFoundError:
            raise
        except OSError:  # a file system without hard links
            with self._one_at_a_time():
                if not path.exists():
                    os.replace(part, path)

    def holds(self, name: str) -> bool:
        """Whether a claim of this process still stands: it may have been slow and lost it."""
        file = self._held.get(name)
        try:
            return file is not None and os.path.samestat(os.fstat(file), (self.folder / name).stat())
        except OSError:
            return False

    def release(self, name: str) -> None:
        """Gives a claim back."""
        if self.holds(name):
            (self.folder / name).unlink(missing_ok=True)
        with self._lock:
            file = self._held.pop(name, None)
            if file is not None:
                os.close(file)

    def holder(self, name: str) -> str | None:
        """Who holds a claim, in words; None if nobody does."""
        seen = self._look(self.folder / name)
        if seen is None:
            return None
        owner = seen.owner
        age = max(0.0, (self._now() - seen.touched) / 1e9)
        job = f", job {owner['job']}" if owner.get("job") else ""
        return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}{job}, last seen {age:.0f} s ago"

    def clear(self, names: Iterable[str]) -> None:
        """Removes what is left of the folder once all of `names` are done by whomever."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
        for path in [
            *self.folder.glob(".*.dead"),
            *self.folder.glob(".*.part"),
            self.folder / ".clock",
            self.folder / ".lock",
        ]:
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # another process looks at it just now
            self.folder.rmdir()

    def leave(self, word: str) -> None:
        """Removes the folder, with what was first said under `word`, unless a claim of another process is in it."""
        with contextlib.suppress(FileNotFoundError):
            if all(path.name == word or path.name.startswith(".") for path in self.folder.iterdir()):
                self.clear([word])

    def is_old(self, path: Path) -> bool:
        """Whether a file was not touched for longer than the timeout; false if it is gone."""
        try:
            return self._now() - path.stat().st_mtime_ns > self.timeout * 1e9
        except FileNotFoundError:
            return False

    def _make_folder(self) -> None:
        # Another process may clear the folder while `mkdir` looks whether what is in its way is a folder.
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            if self.folder.exists() and not self.folder.is_dir():
                raise

    def _create(self, path: Path) -> bool:
        self._make_folder()
        try:
            file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except (FileExistsError, FileNotFoundError):  # the second: the folder was cleared between
            return False
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": process_start(os.getpid())}
        job = " ".join(os.environ[n] for n in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if os.environ.get(n))
        content = {**owner, "place": self._place, "job": job, "token": uuid.uuid4().hex}
        os.write(file, json.dumps(content).encode())
        with self._lock:
            self._held[path.name] = file
        return True

    def _look(self, path: Path) -> _Seen | None:
        # Opened, not only asked for: a network file system then asks its server anew.
        try:
            with path.open("rb") as file:
                return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ESTALE:  # another host removed it between
                return None
            raise

    def _is_dead(self, seen: _Seen) -> bool:
        owner = seen.owner
        if owner.get("place") == self._place and process_start(owner["pid"]) != owner["started"]:
            return True
        return self._now() - seen.touched > self.timeout * 1e9

    def _now(self) -> int:
        """The file system's own clock, ns: clocks of hosts may differ by more than a timeout."""
        for _ in range(100):
            self._make_folder()
            with contextlib.suppress(FileNotFoundError), (self.folder / ".clock").open("a") as file:
                os.utime(file.fileno())
                return os.fstat(file.fileno()).st_mtime_ns
        raise OSError(errno.EBUSY, "it is removed again and again", str(self.folder))

    def _bury(self, path: Path, seen: _Seen) -> bool:
        """Removes a dead claim; false if another process did, or it came to life."""
        grave = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.dead")
        try:
            os.rename(path, grave)
        except FileNotFoundError:
            return False
        same = self._look(grave) == seen
        if not same:
            # Another process buried the dead one and claimed anew while this one looked: its claim goes back.
            with contextlib.suppress(OSError):
                os.link(grave, path)
        grave.unlink(missing_ok=True)
        return same
