"""`reblock status`: what it reads from a run folder and from Slurm's answers, and that it needs neither to be whole."""

import csv
import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml

from launch import main as command
from launch import slurm


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of two ranks after 30 steps."""
    folder = tmp_path / "runs" / "tiny"
    (folder / "job").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "checkpoints").mkdir()
    recipe = {
        "trainer": {"num_nodes": 2, "devices": 1, "max_epochs": 4, "accumulate_grad_batches": 2},
        "data": {"init_args": {"batch_size": 4, "global_batch_size": None}},
    }
    (folder / "job" / "config.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "job" / "jobs.jsonl").write_text(json.dumps({"job": "12", "stage": "fit", "time": "yesterday"}) + "\n")
    keys = ["step", "epoch", "train/loss", "val/loss", "train/samples_per_s"]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows({"step": n, "epoch": n // 10, "train/loss": 1 / (n + 1)} for n in range(29))
        writer.writerow({"step": 29, "epoch": 2, "train/loss": 0.125, "train/samples_per_s": 8.0})
        writer.writerow({"step": 29, "epoch": 2, "val/loss": 0.5})
    torch.save({"global_step": 20, "state_dict": {"a": torch.zeros(10)}}, folder / "checkpoints" / "last.ckpt")
    old = time.time() - 600
    os.utime(folder / "checkpoints" / "last.ckpt", (old, old))
    return folder


@pytest.fixture
def shown(monkeypatch, capsys):
    """(run, Slurm's answers by command) -> what is printed."""

    def show(run: Path, answers: dict[str, str] | None = None) -> str:
        monkeypatch.setattr(slurm, "at_hand", lambda name="sbatch": answers is not None)
        monkeypatch.setattr(slurm, "ask", lambda *words: (answers or {}).get(words[0]))
        command.main(["status", str(run)])
        return capsys.readouterr().out

    return show


RUNNING = (
    "JobId=12 JobName=a b JobState=RUNNING Reason=None Requeue=1 Restarts=3 StartTime=2026-11-25T10:00:00 "
    "EndTime=2026-11-25T12:00:00 TimeLimit=02:00:00 NodeList=node[1-2] Comment=a=b c ExitCode=0:0\n"
)


def test_a_run_under_way(run, shown):
    said = shown(run, {"scontrol": RUNNING})
    assert "fit 12, RUNNING, since 2026-11-25 10:00:00 on node[1-2], its time ends at 2026-11-25 12:00:00" in said
    assert "requeued 3 times" in said
    assert "step 30, epoch 3 of 4" in said
    # 8 samples/s; a step is 4 samples x 2 ranks x 2 batches.
    assert "0.5 steps/s (2 s a step), 8 samples/s" in said
    assert "train/loss 0.125" in said and "val/loss 0.5" in said
    assert "last.ckpt: step 20, written 10 min ago" in said
    assert "none in the logs of the last start" in said


def test_jobs_that_wait_and_arrays_by_state(run, shown):
    lines = [f"JobId={20 + n} ArrayJobId=12 JobState={state} Restarts={n} Reason=Resources"
             for n, state in enumerate(["PENDING", "RUNNING", "RUNNING"])]  # fmt: skip
    said = shown(run, {"scontrol": "\n".join(lines) + "\n"})
    assert "fit 12, PENDING 1 of 3 tasks, waits for: Resources, requeued 0 times" in said
    assert "fit 12, RUNNING 2 of 3 tasks" in said and "requeued 2 times" in said


def test_without_slurm(run, shown):
    (run / "logs" / "tiny-12.log").write_text(
        "x  job 12: start 1 (0 requeued) on\nx  job 12: start 2 (1 requeued) on\n"
    )
    said = shown(run)
    assert "fit 12, submitted yesterday, started, requeued once" in said
    assert "Slurm's commands are not here" in said and "step 30" in said


def test_what_the_controller_forgot_the_accounting_knows(run, shown):
    said = shown(run, {"sacct": "12|FAILED|2026-11-25T10:00:00|2026-11-25T11:00:00|node1|1:0\n"})
    assert "fit 12, FAILED, from 2026-11-25 10:00:00 to 2026-11-25 11:00:00, exit code 1" in said
    assert "Slurm knows nothing of it any more" in shown(run, {})


def test_the_errors_of_the_last_start_only(run, shown):
    logs = run / "logs"
    (logs / "tiny-12-r0-0.log").write_text("Traceback (most recent call last):\nOldError: long ago\n")
    (logs / "tiny-12-r1-0.log").write_text("Error: first\n" + "Traceback (most recent call last):\n  x\nNewError: y\n")
    (logs / "tiny-12-r1-1.log").write_text("all is well\n" * 9)
    (logs / "tiny-12.log").write_text("srun: error: node1: task 0: Exited with exit code 1\n")
    said = shown(run)
    assert "NewError: y" in said and "srun: error: node1" in said
    assert "OldError" not in said and "all is well" not in said and "Error: first" not in said


def test_nothing_needs_to_be_there(tmp_path, shown):
    (tmp_path / "empty").mkdir()
    said = shown(tmp_path / "empty", {})
    assert "none was submitted" in said and "no step was logged yet" in said and "none yet" in said


def test_damaged_files_are_said(run, shown):
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:200])
    with (run / "metrics.csv").open("a") as file:
        file.write("3")  # the row that is being written
    (run / "job" / "config.yaml").write_text("a: [")
    said = shown(run)
    assert "last.ckpt: cannot be read" in said
    assert "8 samples/s" in said and "steps/s" not in said


def test_a_run_that_is_not_there_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)
    with pytest.raises(SystemExit):
        command.main(["status", str(tmp_path / "gone")])
    assert "is no folder; expected a run folder" in capsys.readouterr().err


def test_what_slurm_says_of_partitions(monkeypatch):
    answers = {
        "scontrol": "PartitionName=gpu Default=NO MaxTime=1-00:00:00 TotalNodes=2\n"
        "PartitionName=cpu Default=YES MaxTime=UNLIMITED TotalNodes=3\n",
        "sinfo": "gpu|64|gpu:h100:8(S:0-1)\ngpu|96+|gpu:a100:4,gpu:v100:2\ncpu|32|(null)\n",
    }
    monkeypatch.setattr(slurm, "ask", lambda *words: answers.get(words[0]))
    gpu, cpu = slurm.partitions() or []
    assert gpu == slurm.Partition("gpu", False, 2, "1-00:00:00", 96, 8)
    assert cpu == slurm.Partition("cpu", True, 3, "UNLIMITED", 32, None)
