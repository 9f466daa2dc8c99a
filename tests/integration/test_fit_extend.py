"""`reblock fit` that ended as it was told and is then extended: it goes on as if it had never ended."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from launch import main as command
from trainer.callbacks.measurement_files import load_arrays

STEPS = 8
#: What differs from run to run though nothing is wrong.
CLOCK = {"train/samples_per_s", "train/tokens_per_s"}
ACCUMULATE = ["--trainer.accumulate_grad_batches", "3"]
HALVES = ["--trainer.val_check_interval", "0.5"]


def fits(folder: Path, write_recipe) -> Callable[..., Path]:
    """(name, *options) -> the folder of the run, after `reblock fit` with these options."""
    recipe = yaml.safe_load(write_recipe(folder, measure=False).read_text())
    recipe["trainer"] |= {"callbacks": [{"class_path": "tests.support.visits.Visits"}], "max_epochs": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def run(name: str, *options: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REBLOCK_TRACEBACK", "1")
            command.main(["fit", "--config", str(path), "--run.name", name, *options])
        return folder / "runs" / name

    return run


@pytest.fixture
def fit(tmp_path, write_recipe) -> Callable[..., Path]:
    return fits(tmp_path, write_recipe)


@pytest.fixture(scope="module")
def never_ended(tmp_path_factory, write_recipe) -> Callable[..., Path]:
    """(*options) -> the folder of the run that goes to its end at once; each is made once. Not to be written to."""
    fit, made = fits(tmp_path_factory.mktemp("whole"), write_recipe), {}

    def run(*options: str) -> Path:
        if options not in made:
            made[options] = fit(f"whole-{len(made)}", *options)
        return made[options]

    return run


def visits(run: Path) -> list:
    return [json.loads(line) for line in (run / "visits.jsonl").read_text().splitlines()]


def rows(run: Path) -> list[list[tuple[str, str]]]:
    """Every row of metrics.csv, in whatever order."""
    with (run / "metrics.csv").open(newline="") as file:
        return sorted(sorted((k, v) for k, v in row.items() if v and k not in CLOCK) for row in csv.DictReader(file))


ENDS = {
    "max_epochs": (["--trainer.max_epochs", "1"], []),
    "max_steps": (["--trainer.max_steps", "6"], []),
    "max_steps, by steps": (["--trainer.max_steps", "6"], ["--trainer.max_steps", "11", "--trainer.max_epochs", "-1"]),
    "max_steps in epoch 1": (["--trainer.max_steps", "11"], []),
    "max_steps at the end of an epoch": (["--trainer.max_steps", "8"], []),
    "max_steps at the end of an epoch, by steps": (["--trainer.max_steps", "8"], ["--trainer.max_steps", "12"]),
    "max_epochs, by steps": (["--trainer.max_epochs", "1"], ["--trainer.max_steps", "12"]),
    "max_time": (["--trainer.max_time", '{"microseconds": 1}'], []),
    "max_time, accumulating": ([*ACCUMULATE, "--trainer.max_time", '{"microseconds": 1}'], ACCUMULATE),
    "max_steps, accumulating": ([*ACCUMULATE, "--trainer.max_steps", "4"], ACCUMULATE),
    "max_steps after a validation": ([*HALVES, "--trainer.max_steps", "4"], HALVES),
    "max_steps before a validation": ([*HALVES, "--trainer.max_steps", "3"], HALVES),
}


@pytest.mark.parametrize("ended", ENDS)
def test_a_run_that_ended_and_is_extended_is_one_that_never_ended(fit, never_ended, ended):
    first, then = ENDS[ended]
    whole = never_ended(*then)
    assert len(visits(whole)) in (2 * STEPS, 11, 12)
    parts = fit("parts", *first)
    assert 0 < len(visits(parts)) < len(visits(whole))
    fit("parts", "--run.resume", "true", *then)
    assert visits(parts) == visits(whole)
    assert rows(parts) == rows(whole)


def test_a_run_ended_twice_by_epochs_goes_on(fit, never_ended):
    whole = never_ended("--trainer.max_epochs", "3")
    parts = fit("parts", "--trainer.max_epochs", "1")
    for epochs in ("1", "2", "3"):  # the first has nothing to do
        fit("parts", "--run.resume", "true", "--trainer.max_epochs", epochs)
    assert visits(parts) == visits(whole) and rows(parts) == rows(whole)


def test_what_was_measured_in_mid_epoch_is_measured_again_at_its_end(tmp_path, write_recipe, monkeypatch):
    """A fit that stops in mid-epoch measures there, under the epoch's name."""
    monkeypatch.setenv("REBLOCK_TRACEBACK", "1")
    path = write_recipe(tmp_path, epochs=2)
    found = {}
    for name, parts in (("whole", [[]]), ("parts", [["--trainer.max_steps", "6"], ["--run.resume", "true"]])):
        for options in parts:
            command.main(["fit", "--config", str(path), "--run.name", name, *options])
        files = sorted((tmp_path / "runs" / name / "measurements").glob("*.npz"))
        found[name] = {file.name: load_arrays(file) for file in files}
    assert found["whole"].keys() == found["parts"].keys() and "masking-epoch-001.npz" in found["whole"]
    for name, arrays in found["whole"].items():
        for key, values in arrays.items():
            np.testing.assert_array_equal(values, found["parts"][name][key], err_msg=f"{name} {key}")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--data.global_batch_size", "1000", "--data.batch_size", "null"], "expected at least one full batch"),
        (["--data.global_batch_size", "5", "--data.batch_size", "null", "--trainer.devices", "2"], "on 2 ranks"),
        (["--data.batch_size", "33"], "expected at least one full batch"),
        (["--data.val_samples", "1", "--data.passes", "1"], "got 2 probe samples, expected 1 to 1"),
    ],
)
def test_a_fit_that_cannot_start_leaves_no_run_behind(tmp_path, write_recipe, capsys, monkeypatch, wrong, message):
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)
    monkeypatch.setattr(
        "trainer.module.RetrainBlocks.configure_model", lambda *a: pytest.fail("the model was built before")
    )
    with pytest.raises(SystemExit) as stop:
        command.main(["fit", "--config", str(write_recipe(tmp_path)), *wrong])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and message in said, said
    assert not (tmp_path / "runs" / "tiny").exists()
