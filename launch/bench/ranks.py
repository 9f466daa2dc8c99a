"""Ranks of a fit as processes of this machine: started, killed, waited for, and nothing of them forgotten."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

#: Variables of a cluster that this process may run in: its ranks are not ours.
_CLUSTER = ("SLURM_", "TORCHELASTIC_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK")


def wait_for(condition: Callable[[], T], seconds: float, what: str, pause: float = 0.005) -> T:
    """What `condition` gives, as soon as that is true.

    Raises:
        TimeoutError: if it is not in time.
    """
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:.0f} s for {what}")
        time.sleep(pause)
    return found


class Ranks:
    """One `reblock` command on several ranks; each is a session of its own, so that what it started is known.

    Args:
        arguments: of `reblock`.
        ranks: how many; they meet over 127.0.0.1.
        logs: folder for their output, rank0.log and so on.
        environment: beside this process's own.
        homes: current directories of single ranks; `logs` is that of the others.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        ranks: int,
        logs: Path,
        environment: dict[str, str] | None = None,
        homes: Mapping[int, Path] | None = None,
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs = [logs / f"rank{rank}.log" for rank in range(ranks)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(_CLUSTER)}
        # With LOCAL_RANK set, Lightning starts no further process.
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "NODE_RANK": "0"}
        root = str(Path(__file__).resolve().parents[2])
        inherited |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": root} | place | (environment or {})
        self.processes = []
        for rank, log in enumerate(self.logs):
            with log.open("w") as out:
                program = [sys.executable, "-c", "from launch.main import main; main()"]
                self.processes.append(
                    subprocess.Popen(
                        [*program, *arguments], env=inherited | {"LOCAL_RANK": str(rank)},
                        cwd=(homes or {}).get(rank, logs), stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                    )
                )  # fmt: skip
        self._sessions = {process.pid for process in self.processes}

    def kill(self, ranks: Sequence[int]) -> None:
        """SIGKILL to these ranks' own processes; what they started must end by itself."""
        for rank in ranks:
            self.processes[rank].send_signal(signal.SIGKILL)

    def ended(self) -> bool:
        """Whether every rank has ended."""
        return all(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses, once all ranks have ended by themselves.

        Raises:
            TimeoutError: if they have not in time.
        """
        wait_for(self.ended, seconds, "the ranks to end")
        return [process.returncode for process in self.processes]

    def left_over(self) -> list[int]:
        """Processes that ranks have started and that are still there."""
        return [pid for pid in _processes() if _session(pid) in self._sessions and pid not in self._sessions]

    def output(self) -> str:
        """The end of what each rank has said."""
        return "\n".join(f"-- {log}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.left_over():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session(pid: int) -> int | None:
    """Session of a process that is alive; None for one that is gone, or dead and not yet waited for."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[3])
