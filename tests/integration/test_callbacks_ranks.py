"""Measurements on two real ranks over gloo: where one fails, both end soon and say which and why."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fork_server import popen

#: Seconds after which ranks count as waiting for each other for ever; each run takes about ten.
DEADLINE = 240

FIT = """
import sys
from pathlib import Path
import torch
from tests.support.measured_fits import Clips, make_module, make_trainer
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.sinks import SinkFrequency

root, base, fails = sys.argv[1:4]
torch.set_num_threads(1)

class Sinks(SinkFrequency):
    calls = 0
    def observe(self, module, probes):
        self.calls += 1
        if fails == "observe" and torch.distributed.get_rank() == 1 and self.calls == 2:
            raise KeyError("a probe that rank 1 cannot bear")
        return super().observe(module, probes)

    def check(self, module):
        if fails == "check" and torch.distributed.get_rank() == 1:
            raise ValueError("settings that rank 1 cannot bear")
        super().check(module)

class Source(Clips):
    def probe_samples(self, count):
        if fails == "read" and torch.distributed.get_rank() == 1:
            raise OSError("a shard that rank 1 cannot read")
        return super().probe_samples(count)


settings = {"prompts": 4, "sigmas": (0.3, 0.7), "batch_size": 1}
callbacks = [Sinks(**settings), MaskingRobustness(ratios=(0.5,), scopes=("retrained",), **settings)]
trainer = make_trainer(Path(root), callbacks, devices=2, strategy="ddp", max_epochs=1, use_distributed_sampler=False)
trainer.fit(make_module(base), datamodule=Source())
torch.distributed.destroy_process_group()
print("rank", trainer.global_rank, "has finished")
"""


def run(tmp_path: Path, base: Path, fails: str) -> list[tuple[int, str]]:
    """Exit status and output of two ranks, which nobody ends but themselves."""
    script = tmp_path / "fit.py"
    script.write_text(FIT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    shared = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks, logs = [], [tmp_path / f"rank{rank}.log" for rank in range(2)]
    for rank, log in enumerate(logs):
        # With LOCAL_RANK set, Lightning starts no further process: no launcher ends a rank that waits.
        place = {"WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        with log.open("w") as out:
            ranks.append(
                popen(
                    [sys.executable, str(script), str(tmp_path / "run"), str(base), fails],
                    env=os.environ | shared | place, cwd=tmp_path, stdout=out, stderr=subprocess.STDOUT,
                )
            )  # fmt: skip
    try:
        status = [process.wait(DEADLINE) for process in ranks]
    except subprocess.TimeoutExpired:
        pytest.fail("the ranks wait for each other:\n" + "\n".join(log.read_text()[-3000:] for log in logs))
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [(code, log.read_text()) for code, log in zip(status, logs, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fails, message",
    [
        ("observe", "KeyError: 'a probe that rank 1 cannot bear'"),
        ("read", "OSError: a shard that rank 1 cannot read"),
        ("check", "ValueError: settings that rank 1 cannot bear"),
    ],
)
def test_a_failure_on_rank_1_ends_both(tmp_path, base_folder, fails, message):
    (zero, zero_said), (one, one_said) = run(tmp_path, base_folder, fails)
    assert zero != 0 and one != 0
    assert f"RankFailedError: rank 1 failed, so all ranks stop. Its message: {message}" in zero_said
    assert message in one_said and "on rank 1 of 2" in one_said and "RankFailedError" not in one_said
    assert "has finished" not in zero_said + one_said
    assert not (tmp_path / "run" / "measurements").exists()


@pytest.mark.slow
def test_arrays_that_rank_0_cannot_save_end_both(tmp_path, base_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "measurements").write_text("a file where the folder should be")
    (zero, zero_said), (one, one_said) = run(tmp_path, base_folder, "save")
    assert zero != 0 and one != 0
    assert "FileExistsError" in zero_said and "on rank 0 of 2" in zero_said
    assert "RankFailedError: rank 0 failed, so all ranks stop. Its message: FileExistsError" in one_said
    assert "has finished" not in zero_said + one_said


@pytest.mark.slow
def test_two_ranks_that_do_not_fail_finish(tmp_path, base_folder):
    for rank, (status, said) in enumerate(run(tmp_path, base_folder, "nothing")):
        assert status == 0, said
        assert f"rank {rank} has finished" in said
    names = sorted(path.name for path in (tmp_path / "run" / "measurements").iterdir())
    stages = ("base", "epoch-000", "epoch-001")
    assert names == sorted(f"{kind}-{stage}.npz" for kind in ("sinks", "masking") for stage in stages)
