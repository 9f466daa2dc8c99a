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
    return reblock(folder, "fit", "--config", path, "--run.resume", "true", *options, ranks=ranks, **how)


def callback(name: str, **options) -> dict:
    return {"class_path": f"tests.support.signal_files.{name}", "init_args": options}


def has_step(run: Path, step: int) -> bool:
    return any(int(row["step"]) >= step for row in rows_of(run) if "train/loss" in row)


def saved_step(run: Path) -> int:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]


def finish(folder: Path, write_recipe, **how) -> None:
    with start(folder, write_recipe, **how) as ranks:
        assert set(ranks.statuses()) == {0}, ranks.said()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_recipe) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(folder, write_recipe)
    return folder / "runs" / "tiny"


@pytest.mark.parametrize("name, status", [("SIGUSR1", 75), ("SIGTERM", 143)])
def test_a_signal_to_all_processes_of_one_rank(tmp_path, write_recipe, undisturbed, name, status):
    """Loader workers get it too, as where Slurm runs without cgroups; a second one changes nothing."""
    run = tmp_path / "runs" / "tiny"
    with start(tmp_path, write_recipe, workers=1) as ranks:
        ranks.until(lambda: has_step(run, 2))
        for _ in range(2):
            os.killpg(ranks.processes[1].pid, signal.Signals[name])
        assert ranks.statuses() == [status] * WORLD, ranks.said()
    said = ranks.logs[0].read_text()
    assert (
        f"stopped by {'SIGTERM' if status == 143 else 'the stop signal'} " in said and f"exit status {status}" in said
    )
    # What only a finished fit leaves:
    assert not (run / "graft.safetensors").exists() and not (run / "fingerprint.json").exists()
    finish(tmp_path, write_recipe)
    assert_same_run(run, undisturbed)


def test_signals_at_every_inconvenient_place(tmp_path, write_recipe, undisturbed):
    """One run: stopped within an epoch, at an epoch's last step, in a validation, in a measurement."""
    run = tmp_path / "runs" / "tiny"
    probes = {"prompts": 2, "sigmas": [0.25, 0.75]}
    # A question put at the end of a step is answered at the end of the next.
    places = [
        (callback("SignalAtStep", step=1, rank=1), 3, "after step 3"),
        (callback("SignalAtStep", step=STEPS - 2, rank=0), STEPS - 1, f"after step {STEPS}"),
        (callback("SignalInValidation", epoch=0, rank=1), STEPS - 1, "in a validation"),
        (callback("SignalInMeasurement", signal_epoch=1, signal_rank=1, **probes), 2 * STEPS - 1, "in a measurement"),
    ]
    for own, step, where in places:
        with start(tmp_path, write_recipe, callbacks=[own]) as ranks:
            assert ranks.statuses() == [75] * WORLD, ranks.said()
        assert f"stopped by the stop signal {where}, exit status 75" in ranks.logs[0].read_text()
        assert saved_step(run) == step
    assert not (run / "measurements" / "sinks-epoch-002.npz").exists()
    finish(tmp_path, write_recipe)
    assert_same_run(run, undisturbed)


def test_a_signal_in_the_last_measurement_leaves_the_fit_to_be_finished(tmp_path, write_recipe, undisturbed):
    run = tmp_path / "runs" / "tiny"
    own = callback("SignalInMeasurement", signal_epoch=EPOCHS - 1, signal_rank=0, prompts=2, sigmas=[0.25, 0.75])
    with start(tmp_path, write_recipe, callbacks=[own]) as ranks:
        assert ranks.statuses() == [75] * WORLD, ranks.said()
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
    with start(tmp_path, write_recipe, "--trainer.devices", "2", "--trainer.strategy", "ddp", ranks=1) as ranks:
        ranks.until(lambda: holds_back(ranks.processes[0].pid, signal.SIGUSR1))
        ranks.send(signal.SIGUSR1)
        assert ranks.logs[0].read_text() == ""  # nothing has been loaded
        assert ranks.statuses() == [75], ranks.said()
    assert "stopped by the stop signal before the base was loaded" in ranks.logs[0].read_text()
    assert not (tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt").exists()
