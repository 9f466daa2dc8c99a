"""Starts `reblock encode` in a new process for each line of its input, without importing torch again.

Arguments: shards, base. Each line on the standard input is a folder to encode into; the answer is the process id.
"""

import multiprocessing.forkserver
import os
import sys
import traceback
from pathlib import Path

FAILED = "an encoding process failed"


def main(shards: str, base: Path) -> None:
    """Serves until its input ends."""
    # Not at the top: every decoding process imports this file.
    import torch

    from data.encode.command import encode
    from data.video.worker_pool import WorkerPool

    torch.set_num_threads(1)
    WorkerPool(1, 60.0)  # sets what the fork server imports
    server = multiprocessing.forkserver._forkserver
    server.ensure_running()
    # One fork server for the processes of all runs: loading it for each run would take most of the test's time.
    server.ensure_running = lambda: None
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            try:
                encode(shards, Path(line.strip()), base=base, batch_size=2, claim_timeout=5.0, max_fault_share=0.5)
            except BaseException:
                # A marker: the fork server also prints a traceback if a run is killed while it asks for a process.
                print(f"{FAILED}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        print(process, flush=True)
    os._exit(0)  # a regular exit would wait for the fork server, which the runs still use


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
