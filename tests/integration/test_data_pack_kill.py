"""Packing that is killed and started again gives the bytes of an undisturbed run."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.pack.command import pack
from data.synth.command import synth
from tests.support.fork_server import Process, popen

pytestmark = pytest.mark.slow
OPTIONS = {"buckets": ["7x32x32"], "shard_samples": 20, "max_fault_share": 0.5}
PACK = "import sys, json; from data.pack.command import pack; pack(sys.argv[1], sys.argv[2], **json.loads(sys.argv[3]))"


def start(src: Path, out: Path, processes: int) -> Process:
    options = json.dumps({**OPTIONS, "processes": processes})
    return popen(
        [sys.executable, "-c", PACK, str(src), str(out), options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def wait_for(path: Path, pattern: str, count: int, process: Process) -> None:
    deadline = time.monotonic() + 60
    while len(list(path.glob(pattern))) < count and process.poll() is None:
        assert time.monotonic() < deadline, f"{pattern} does not appear"
        time.sleep(0.002)


def files_without_journal(out: Path) -> dict[str, bytes]:
    names = [path for path in out.rglob("*") if path.is_file() and "survey" not in path.relative_to(out).parts]
    return {str(path.relative_to(out)): path.read_bytes() for path in names if not path.name.endswith(".part")}


def test_killed_runs_end_in_the_same_bytes(tmp_path):
    made, src = tmp_path / "made", tmp_path / "src"
    synth(made, clips=24, frames=7, size=32)
    src.mkdir()
    for i in range(600):
        name = f"clip-{i % 24:06d}"
        (src / f"{i:04d}.mp4").hardlink_to(made / f"{name}.mp4")
        (src / f"{i:04d}.txt").write_text(f"{i}")
    (src / "0100.mp4").unlink()
    (src / "0100.mp4").write_bytes(b"not a video")
    pack(str(src), tmp_path / "undisturbed", **OPTIONS, processes=2)
    out, killed = tmp_path / "out", 0
    rng = random.Random(0)
    # While clips are probed, in the middle of the shards, and near their end.
    moments = [("survey/0*.jsonl", 1), ("records/*.json", 3), ("records/*.json", 12)]
    for number, (pattern, count) in enumerate(moments):
        process = start(src, out, processes=1 + number % 2)
        wait_for(out, pattern, count, process)
        time.sleep(rng.uniform(0, 0.05))  # no condition: a random moment for every kill
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        assert not (out / "index.json").exists()
    assert killed == len(moments)
    last = start(src, out, processes=2)
    assert last.wait(timeout=120) == 0, last.stderr.read().decode()
    assert files_without_journal(out) == files_without_journal(tmp_path / "undisturbed")
    assert (
        len(files_without_journal(out)) == 2 * 30 + 4
    )  # 599 clips in 30 shards, their records, the index and three lists
