"""Peak memory of a process."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def host_peak(*, reset: bool = False) -> int:
    """Peak resident bytes of this process; `reset` starts counting from what is resident now, where Linux allows it."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    # A child process inherits its parent's ru_maxrss on Linux; VmHWM is a process's own.
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
