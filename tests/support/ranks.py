"""Real ranks of one job on this machine, started apart: no launcher ends one that waits for another."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

#: Seconds after which ranks count as waiting for each other for ever.
DEADLINE = 120
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Ranks:
    """Processes of one job; rank n writes to FOLDER/rank-n.log.

    Args:
        folder: for logs; the current directory of all.
        arguments: of Python, for each rank.
        environment: besides this process's.
        prefix: command that starts each rank's interpreter.
    """

    def __init__(
        self, folder: Path, *arguments: Sequence[str | Path], environment: dict[str, str] | None = None, prefix=()
    ) -> None:
        shared = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(len(arguments)), "NODE_RANK": "0"}  # fmt: skip
        self.logs = [folder / f"rank-{rank}.log" for rank in range(len(arguments))]
        self.processes = []
        for rank, own in enumerate(arguments):
            # With LOCAL_RANK set, Lightning starts no further process.
            place = {"LOCAL_RANK": str(rank)} if len(arguments) > 1 else {}
            with self.logs[rank].open("a") as out:
                self.processes.append(
                    subprocess.Popen(
                        [*prefix, sys.executable, *map(str, own)],
                        env=os.environ | shared | place | (environment or {}), cwd=folder, stdin=subprocess.DEVNULL,
                        stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def said(self) -> str:
        """The end of all logs."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in self.logs)

    def until(self, condition: Callable[[], bool], deadline: float = DEADLINE) -> None:
        """Waits for a condition while all ranks run."""
        end, pause = time.monotonic() + deadline, threading.Event()
        while not condition():
            assert all(process.poll() is None for process in self.processes), f"a rank ended: {self.said()}"
            assert time.monotonic() < end, f"not in {deadline} s: {self.said()}"
            pause.wait(0.002)

    def send(self, number: int, *ranks: int) -> None:
        """A signal to some ranks, or to all."""
        for rank in ranks or range(len(self.processes)):
            self.processes[rank].send_signal(number)

    def statuses(self, deadline: float = DEADLINE) -> list[int]:
        """Exit statuses, once all have ended by themselves."""
        end = time.monotonic() + deadline
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"ranks still run after {deadline} s: {self.said()}") from None


def reblock(folder: Path, *arguments: str | Path, ranks: int = 1, **how) -> Ranks:
    """The command, started on so many ranks."""
    # As a file: Lightning starts further ranks by the name of the program.
    command = [Path(sys.executable).with_name("reblock"), *arguments]
    together = ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"] if ranks > 1 else []
    return Ranks(folder, *[[*command, *together]] * ranks, **how)
