"""Measures the peak memory of a process."""

import resource
import sys
from contextlib import suppress
from pathlib import Path


def host_peak(*, reset: bool = False) -> int:
    """Peak resident bytes of this process; `reset` first lowers the peak to the current value, if Linux allows it."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    # On Linux a child process inherits its parent's ru_maxrss, but not VmHWM.
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024
