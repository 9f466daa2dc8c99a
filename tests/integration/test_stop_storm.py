"""A storm of signals at steps of a few milliseconds: no deadlock, whole checkpoints, the same losses."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.support.fork_server import popen
from tests.support.long_series import LONG
from tests.support.ranks import ROOT, free_port

TRIALS = 100 if LONG else 25
#: Seconds after which a trial counts as hung.
DEADLINE = 240


class Rank:
    """One process of the storm, and what it says, line by line."""

    def __init__(self, rank: int, port: int, folder: Path, *arguments: str) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0",
                 "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}  # fmt: skip
        self.log = folder / f"rank-{rank}.log"
        self.process = popen(
            [sys.executable, str(ROOT / "tests" / "support" / "signal_storm.py"), *arguments],
            env=os.environ | place, cwd=folder,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log.open("w"), text=True,
        )  # fmt: skip
        self.said: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.strip())

    def hear(self, start: str) -> str:
        """The line that begins so, waited for."""
        end, pause = time.monotonic() + DEADLINE, threading.Event()
        while not (found := [line for line in self.said if line.startswith(start)]):
            assert self.process.poll() is None, f"ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"hung before {start!r}: {self.said[-3:]}, {self.log.read_text()[-3000:]}"
            pause.wait(0.001)
        return found[0]

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_signals_at_random_moments(tmp_path, shards):
    draw, port, pause = random.Random(20), free_port(), threading.Event()
    ranks = [Rank(rank, port, tmp_path, str(shards), str(tmp_path), str(TRIALS)) for rank in range(2)]
    saved, exact = [], 0
    try:
        for number in range(TRIALS):
            for rank in ranks:
                rank.hear(f"running {number}")
            pause.wait(draw.uniform(0, 0.4))
            for rank in draw.choice([ranks, ranks[:1], ranks[1:]]):
                for _ in range(draw.choice([1, 1, 3])):
                    rank.process.send_signal(signal.SIGUSR1)
            for rank in ranks:
                rank.tell(f"sent {number}\n")
            _, _, step, there = ranks[0].hear(f"done {number} ").split()
            saved.append(int(step))
            exact += int(there)
        for rank in ranks:
            rank.hear("finished")
            assert rank.process.wait(DEADLINE) == 0
    finally:
        for rank in ranks:
            rank.process.kill()
            rank.process.wait()
    # The moments were spread over the run, and nearly all trials stopped right after the step that they saved.
    assert len(set(saved)) > TRIALS // 4, saved
    assert exact > TRIALS * 3 // 4, (exact, saved)
