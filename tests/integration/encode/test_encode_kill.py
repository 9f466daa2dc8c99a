"""Encoding by two processes that are killed repeatedly gives the bytes of an undisturbed run."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.bucket import Bucket
from data.encode.process_identity import process_start
from data.synth.draw import render
from data.synth.scenes import choose_scene
from data.video.write import write_video
from tests.support.clip_shards import write_video_shards
from tests.support.encode_runner import FAILED
from tests.support.encoded_shards import files
from tests.support.family_bases import make_pipeline
from tests.support.long_series import LONG
from tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[3]
KILLS, SHARDS = (20, 100) if LONG else (6, 30)
PER_SHARD, FRAMES, SIDE = 4, 5, 32
#: A family that also has an encoded empty caption, a file that several processes may write at once.
BUCKET = Bucket(FRAMES, SIDE, SIDE, "wan")


@pytest.fixture(scope="module")
def shards_and_base(tmp_path_factory):
    """Video shards with a damaged clip in every tenth, and a base."""
    folder = tmp_path_factory.mktemp("kills")
    rows = []
    for number in range(SHARDS * PER_SHARD):
        key = f"clip-{number:03d}"
        if number < 12:
            write_video(folder / f"{number}.mp4", render(choose_scene(0, number), size=SIDE, frames=FRAMES), 12)
        clip = (folder / f"{number % 12}.mp4").read_bytes()
        clip = clip[:200] if number % (10 * PER_SHARD) == 3 else clip
        rows.append((key, clip, choose_scene(0, number).caption.encode(), list(range(FRAMES))))
    shards = write_video_shards(folder / "video", {BUCKET: rows}, per_shard=PER_SHARD)
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "family": "wan"}))
    make_pipeline("wan").save_pretrained(folder / "base")
    return shards, folder / "base"


class Runner:
    """Starts encoding processes through `tests.support.encode_runner`."""

    def __init__(self, shards, base, log):
        self.started = []
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "support" / "encode_runner.py", shards, base],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def start(self, out):
        self.process.stdin.write(f"{out}\n")
        self.process.stdin.flush()
        # The runs print to the same pipe.
        while not (line := self.process.stdout.readline()).strip().isdigit():
            assert line, "the runner ended"
        self.started.append(int(line))
        return self.started[-1]

    def close(self):
        for pid in self.started:  # nobody waited for them before, so no other process can have one of these ids
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(timeout=30)


def wait_for(pids):
    wait_until(lambda: not any(map(process_start, pids)), 120, "encoding makes no progress")


@pytest.mark.slow
def test_kills_do_not_change_the_result(shards_and_base, tmp_path):
    with (tmp_path / "log").open("w") as log:
        runner = Runner(*shards_and_base, log)
        try:
            wait_for([runner.start(tmp_path / "undisturbed")])
            undisturbed, killed, chance = files(tmp_path / "undisturbed"), tmp_path / "killed", random.Random(0)
            assert len(undisturbed) == 3 + 2 * SHARDS and "empty_caption.safetensors" in undisturbed
            assert undisturbed["faults.jsonl"].count(b"\n") == SHARDS / 10
            running = [runner.start(killed) for _ in range(2)]
            # Each kill waits for a random number of finished shards, so that work is left on any machine.
            for count in sorted(chance.sample(range(SHARDS - 10), KILLS)):
                wait_until(
                    lambda count=count: len(list(killed.glob("records/*.json"))) >= count,
                    120,
                    "encoding makes no progress",
                )
                time.sleep(chance.uniform(0.0, 0.3))  # a random moment within a shard
                victim = chance.randrange(2)
                os.kill(running[victim], signal.SIGKILL)
                running[victim] = runner.start(killed)
            wait_for(running)
        finally:
            runner.close()
    assert FAILED not in (tmp_path / "log").read_text(), (tmp_path / "log").read_text()
    found = files(killed)
    # A process killed while it writes one of these leaves a temporary file, which a later run removes.
    leftovers = (".index", ".faults", ".empty_caption")
    assert {name: content for name, content in found.items() if not name.startswith(leftovers)} == undisturbed
