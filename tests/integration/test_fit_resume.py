"""`reblock fit` as a process: killed at any step and started again, it takes the steps it would have taken."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from launch import main as command
from tests.support.run_rows import EPOCHS, STEPS, assert_same_run, rows_of, trained


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=120) == 0, log.read_text()[-3000:]


def kill_past(process: subprocess.Popen, run: Path, step: int, log: Path) -> None:
    """Kills the command and its loader workers as soon as `step` is in metrics.csv."""
    deadline, pause = time.monotonic() + 120, threading.Event()
    while not any(int(row["step"]) >= step for row in rows_of(run) if "train/loss" in row):
        assert process.poll() is None, f"ended before step {step}: {log.read_text()[-3000:]}"
        assert time.monotonic() < deadline, f"no step {step} in time: {log.read_text()[-3000:]}"
        pause.wait(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, write_recipe, reblock) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    log = folder / "log"
    finish(reblock(log, "fit", "--config", write_recipe(folder, workers=2)), log)
    return folder / "runs" / "tiny"


def test_a_whole_run_leaves_every_step_and_its_proofs(uninterrupted):
    assert list(trained(uninterrupted)) == [str(step) for step in range(EPOCHS * STEPS)]
    proof = json.loads((uninterrupted / "fingerprint.json").read_text())
    assert proof["equal"] is True and proof["before"] == proof["after"] and len(proof["before"]) == 64
    stages = {"base", *(f"epoch-{n:03d}" for n in range(EPOCHS + 1))}
    for kind in ("sinks", "masking"):
        assert {p.stem.split("-", 1)[1] for p in (uninterrupted / "measurements").glob(f"{kind}-*.npz")} == stages


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_killed_at_random_steps_it_takes_the_same_steps(tmp_path, write_recipe, reblock, uninterrupted, seed):
    """One run, killed in each epoch, each time going on from what the last one left."""
    draw = random.Random(seed)
    recipe, run, log = write_recipe(tmp_path, workers=2), tmp_path / "runs" / "tiny", tmp_path / "log"
    for epoch in range(EPOCHS):
        step = draw.randrange(epoch * STEPS, (epoch + 1) * STEPS - 1)
        kill_past(reblock(log, "fit", "--config", recipe, "--run.resume", "true"), run, step, log)
    finish(reblock(log, "fit", "--config", recipe, "--run.resume", "true"), log)
    assert "resuming" in log.read_text()
    assert_same_run(run, uninterrupted)


@pytest.fixture
def stopped(uninterrupted, tmp_path) -> Path:
    """A copy of a run, in RUNS/tiny below tmp_path."""
    shutil.copytree(uninterrupted, tmp_path / "runs" / "tiny")
    return tmp_path / "runs" / "tiny"


def refusal(capsys, monkeypatch, *arguments: str | Path) -> str:
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        command.main(["fit", "--config", *map(str, arguments)])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "error: " in said and "Traceback" not in said, said
    return said


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.name: p.read_bytes()
        for p in folder.rglob("*")
        if p.suffix in (".csv", ".ckpt", ".safetensors", ".npz", ".yaml")
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "run 'tiny' exists"),
        (
            ["--run.resume", "true", "--model.init_args.surgery.last", "1"],
            "retrains blocks [1, 2], this run blocks [2]",
        ),
        (["--run.resume", "true", "--trainer.max_epochs", "5", "--model.init_args.base", "OTHER"], "belongs to a base"),
    ],
    ids=["exists", "blocks", "base"],
)
def test_a_run_is_not_continued_as_another(
    stopped, write_recipe, make_transformer, capsys, monkeypatch, options, message
):
    folder = stopped.parents[1]
    make_transformer(11).save_pretrained(folder / "other")
    table = stopped / "metrics.csv"
    # A step after the last checkpoint: an accepted resume would drop it, a refused one must not.
    table.write_text(table.read_text() + table.read_text().splitlines()[-1] + "\n")
    before = contents(stopped)
    options = [str(folder / "other") if option == "OTHER" else option for option in options]
    assert message in refusal(capsys, monkeypatch, write_recipe(folder), *options)
    assert contents(stopped) == before


def test_damaged_checkpoints_are_named_and_left_alone(stopped, write_recipe, capsys, monkeypatch):
    last, previous = (stopped / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    for path in (last, previous):
        path.write_bytes(path.read_bytes()[:1000])
    before = contents(stopped)
    said = refusal(capsys, monkeypatch, write_recipe(stopped.parents[1]), "--run.resume", "true")
    assert f"{last} cannot be read" in said and f"{previous} cannot be read" in said
    assert "copying it to last.ckpt" in said and contents(stopped) == before


@pytest.mark.slow
def test_a_truncated_last_checkpoint_costs_only_the_steps_since_the_one_before(
    stopped, write_recipe, reblock, uninterrupted
):
    last, log = stopped / "checkpoints" / "last.ckpt", stopped.parents[1] / "log"
    cut = last.read_bytes()[:-1000]
    last.write_bytes(cut)
    finish(reblock(log, "fit", "--config", write_recipe(stopped.parents[1], workers=2), "--run.resume", "true"), log)
    said = log.read_text()
    assert f"{last} cannot be read" in said and f"going on from the one before it, {last.parent}/previous.ckpt" in said
    assert (last.parent / "last.ckpt.damaged").read_bytes() == cut
    assert "after step" in said
    assert_same_run(stopped, uninterrupted)
