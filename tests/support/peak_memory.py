"""Runs a command and writes how much memory all its processes took at most: `python -m tests.support.peak_memory`."""

import json
import subprocess
import sys
import threading
import time
from pathlib import Path


def session_bytes(session: int) -> int:
    """Memory of all processes of a session; pages that several of them share count once.

    Source: Pss of /proc/PID/smaps_rollup, in kB (proc(5)); the session is field 6 of /proc/PID/stat.
    """
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            # The second field is the program's name, in brackets, which may hold spaces.
            fields = (process / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                rollup = (process / "smaps_rollup").read_text()
                total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024
        except (OSError, StopIteration):
            continue  # it has ended
    return total


def main(out: Path, command: list[str]) -> int:
    """Runs `command` in a session of its own, and writes {"bytes": peak, "seconds": duration} to `out`."""
    started, peak, ended = time.perf_counter(), 0, threading.Event()
    process = subprocess.Popen(command, start_new_session=True)

    def watch() -> None:
        nonlocal peak
        while not ended.wait(1.0):
            peak = max(peak, session_bytes(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        status = process.wait()
    finally:
        ended.set()
        watcher.join()
    out.write_text(json.dumps({"bytes": peak, "seconds": time.perf_counter() - started}))
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
