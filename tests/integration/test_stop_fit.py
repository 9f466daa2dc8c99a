"""`reblock fit` on two ranks, signalled: it ends where all agree, and goes on to the losses it would have had."""

import os
import signal
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.ranks import Ranks, reblock
from tests.support.run_rows import EPOCHS, STEPS, assert_same_run, rows_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
WORLD = 2


def start(folder: Path, write_recipe, *options: str, callbacks=(), ranks=WORLD, workers=0, **how) -> Ranks:
    """`callbacks` replace the recipe's of the same kind."""
    path = write_recipe(folder, workers=workers)
    recipe = yaml.safe_load(path.read_text())
    recipe["data"]["init_args"]["batch_size"] = 4 // WORLD
    own = {callback["class_path"].replace("SignalInMeasurement", "SinkFrequency").rpartition(".")[2]: callback
           for callback in callbacks}  # fmt: skip
    usual = recipe["trainer"]["callbacks"]
    recipe["trainer"]["callbacks"] = [own.pop(c["class_path"].rpartition(".")[2], c) for c in usual] + [*own.values()]
    path.write_text(yaml.safe_dump(recipe))
    together = ["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"] if ranks > 1 else []
    return reblock(folder, "fit", "--config", path, "--run.resume", "true", *options, *together, ranks=ranks, **how)


def callback(name: str, **options) -> dict:
    return {"class_path": f"tests.support.signal_files.{name}", "init_args": options}


def last_step(run: Path) -> int:
    return max((int(row["step"]) for row in rows_of(run) if "train/loss" in row), default=0)


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def finish(folder: Path, write_recipe, **how) -> None:
    with start(folder, write_recipe, **how) as ranks:
        assert set(ranks.statuses()) == {0}, ranks.output()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_recipe) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder, write_recipe)
    return folder / "runs" / "tiny"


def test_a_signal_to_all_processes_of_one_rank(tmp_path, write_recipe, undisturbed):
    """Loader workers get it too, as where Slurm runs without cgroups; a second one changes nothing. One run, twice."""
    run = tmp_path / "runs" / "tiny"
    for name, status, what in [("SIGUSR1", 75, "the stop signal"), ("SIGTERM", 143, "SIGTERM")]:
        before = last_step(run)
        with start(tmp_path, write_recipe, workers=1) as ranks:
            ranks.until(lambda before=before: last_step(run) >= before + 2)
            for _ in range(2):
                os.killpg(ranks.processes[1].pid, signal.Signals[name])
            assert ranks.statuses() == [status] * WORLD, ranks.output()
        said = ranks.logs[0].read_text()
        assert f"stopped by {what} " in said and f"exit status {status}" in said
        # What only a finished fit leaves:
        assert not (run / "graft.safetensors").exists() and not (run / "fingerprint.json").exists()
    finish(tmp_path, write_recipe)
    assert_same_run(run, undisturbed)


def test_signals_at_every_inconvenient_place(tmp_path, write_recipe, undisturbed):
    """One run: stopped within an epoch, at an epoch's last step, in a validation, in a measurement, in the last one."""
    run = tmp_path / "runs" / "tiny"
    probes = {"prompts": 2, "sigmas": [0.25, 0.75]}
    # A question put at the end of a step is answered at the end of the next.
    places = [
        (callback("SignalAtStep", step=1, rank=1), 3, "after step 3"),
        (callback("SignalAtStep", step=STEPS - 2, rank=0), STEPS - 1, f"after step {STEPS}"),
        (callback("SignalInValidation", epoch=0, rank=1), STEPS - 1, "in a validation"),
        (callback("SignalInMeasurement", signal_epoch=1, signal_rank=1, **probes), 2 * STEPS - 1, "in a measurement"),
        (callback("SignalInMeasurement", signal_epoch=2, signal_rank=0, **probes), 3 * STEPS - 1, "in a measurement"),
    ]
    assert EPOCHS == 3
    for own, step, where in places:
        with start(tmp_path, write_recipe, callbacks=[own]) as ranks:
            assert ranks.statuses() == [75] * WORLD, ranks.output()
        assert f"stopped by the stop signal {where}, exit status 75" in ranks.logs[0].read_text()
        assert saved_step(run) == step
        assert not (run / "measurements" / f"sinks-epoch-{step // STEPS + 1:03d}.npz").exists()
        assert not (run / "graft.safetensors").exists()
    finish(tmp_path, write_recipe)
    assert_same_run(run, undisturbed)
    assert (run / "graft.safetensors").is_file()


def holds_back(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_signal_while_python_still_imports(tmp_path, write_recipe):
    """At once after the start, to the rank that Lightning starts the other one from."""
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    with start(tmp_path, write_recipe, *options, ranks=1, fork=False) as ranks:
        ranks.until(lambda: holds_back(ranks.processes[0].pid, signal.SIGUSR1))
        ranks.send(signal.SIGUSR1)
        assert ranks.logs[0].read_text() == ""  # nothing has been loaded
        assert ranks.statuses() == [75], ranks.output()
    assert "stopped by the stop signal before the base was loaded" in ranks.logs[0].read_text()
    assert not (tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt").exists()
