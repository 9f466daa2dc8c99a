"""Identity of processes: which process a process id means, and whether it still runs."""

import contextlib
import os
import socket
from pathlib import Path


def process_start(pid: int) -> str | None:
    """When a process of this machine started, in the kernel's clock ticks; None if it has ended or is a zombie.

    Where there is no /proc, "?" for every process that runs.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return "?"
    # The name in parentheses may hold any character. The state is the first field behind it, the start the twentieth.
    fields = _read_line(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return None if len(fields) < 20 or fields[0] in "ZX" else fields[19]


def pid_namespace() -> str:
    """Where a process id has one meaning: the host since its last boot, and the container."""
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return " ".join([socket.gethostname(), _read_line("/proc/sys/kernel/random/boot_id"), namespace])


def _read_line(path: str) -> str:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip()
    return ""
