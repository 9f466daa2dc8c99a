"""Ranks of one job as processes of this machine, started apart: no launcher ends one that waits for another."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from tests.support.fork_server import Process, popen

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
#: Seconds after which ranks count as waiting for each other for ever.
DEADLINE = 240.0
#: Variables of a cluster that this process may run in: its ranks are not ours.
_CLUSTER = ("SLURM_", "TORCHELASTIC_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(condition: Callable[[], T], seconds: float, what: str, pause: float = 0.005) -> T:
    """The value of `condition`, as soon as it is true.

    Raises:
        TimeoutError: if it is not true in time.
    """
    deadline, timer = time.monotonic() + seconds, threading.Event()
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        timer.wait(pause)
    return found


class Ranks:
    """The processes of one job. Each is a session of its own, so that the processes it starts can be found.

    Args:
        folder: for the logs `rank-0.log`, `rank-1.log`, ..., written anew; also the current directory of every rank.
        arguments: of Python, one list for each rank; the ranks meet over 127.0.0.1.
        environment: variables beside those of this process.
        prefix: command that starts each rank's interpreter.
        homes: current directories of single ranks.
        fork: whether a server stands in for the start of each interpreter, see `tests.support.fork_server`.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
        homes: Mapping[int, Path] | None = None,
        fork: bool = True,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_CLUSTER)}
        shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(arguments)), "NODE_RANK": "0"}  # fmt: skip
        self.logs = [folder / f"rank-{rank}.log" for rank in range(len(arguments))]
        self.processes: list[Process] = []
        start = popen if fork else subprocess.Popen
        for rank, own in enumerate(arguments):
            # With LOCAL_RANK set, Lightning starts no further process.
            local_rank = {"LOCAL_RANK": str(rank)} if len(arguments) > 1 else {}
            with self.logs[rank].open("w") as out:
                self.processes.append(
                    start(
                        [*prefix, sys.executable, *map(str, own)],
                        env=inherited | shared | local_rank | dict(environment or {}),
                        cwd=(homes or {}).get(rank, folder), stdin=subprocess.DEVNULL,
                        stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
        self._sessions = {process.pid for process in self.processes}

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def output(self) -> str:
        """The end of each rank's output."""
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def send(self, number: int, *ranks: int) -> None:
        """A signal to the own processes of some ranks, or of all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)

    def until(self, condition: Callable[[], bool], deadline: float = DEADLINE) -> None:
        """Waits for a condition while all ranks run."""

        def reached() -> bool:
            if condition():
                return True
            assert all(process.poll() is None for process in self.processes), f"a rank ended: {self.output()}"
            return False

        try:
            wait_for(reached, deadline, "the condition", pause=0.002)
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.output()}") from None

    def ended(self) -> bool:
        """Whether every rank has ended."""
        return all(process.poll() is not None for process in self.processes)

    def statuses(self, deadline: float = DEADLINE) -> list[int]:
        """Exit statuses, once all ranks have ended by themselves.

        Raises:
            AssertionError: if they have not in time.
        """
        try:
            wait_for(self.ended, deadline, "the ranks to end")
        except TimeoutError as error:
            raise AssertionError(f"{error}: {self.output()}") from None
        return [process.returncode for process in self.processes]

    def left_over(self) -> list[int]:
        """Processes that ranks have started and that are still there."""
        return [pid for pid in _processes() if _session(pid) in self._sessions and pid not in self._sessions]


def reblock(folder: Path, *arguments: str | Path, ranks: int = 1, **how) -> Ranks:
    """The `reblock` command, started on `ranks` ranks."""
    # As a file: Lightning starts further ranks by the name of the program.
    command = [Path(sys.executable).with_name("reblock"), *arguments]
    return Ranks(folder, *[command] * ranks, **how)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session(pid: int) -> int | None:
    """Session of a process that is alive; None for one that is gone, or dead and not yet waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[3])
