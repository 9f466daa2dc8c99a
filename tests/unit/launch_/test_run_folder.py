"""The run folder's paths are those that the code which writes there uses; readers take what a killed run leaves."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml

from data.stream.fault_log import fault_file
from launch.run_folder import RunFolder
from trainer.callbacks.measurement_files import figure_path, measurement_path, save_arrays


@pytest.fixture
def run(tmp_path):
    return RunFolder(tmp_path / "runs" / "tiny")


def test_paths_agree_with_those_who_write_them(run):
    assert measurement_path(run.path, "sinks", "base").parent == run.measurements
    assert figure_path(run.path, "sinks", "base").parent == run.figures
    assert run.faults() == fault_file(run.path, 0) and run.faults(3).name == "faults-rank3.jsonl"
    assert run.last_checkpoint.relative_to(run.path).as_posix() == "checkpoints/last.ckpt"
    assert [run.script(stage).name for stage in ("encode", "fit", "export")] == [
        "encode.sbatch", "job.sbatch", "export.sbatch",
    ]  # fmt: skip


def test_a_folder_that_holds_nothing_is_read_as_empty(run):
    assert run.read_config() == {} and run.read_metrics() == ([], [])
    assert run.read_measurements("sinks") == {} and run.read_fingerprint() is None and run.read_versions() is None
    with pytest.raises(ValueError, match=r"graft\.safetensors does not exist"):
        run.read_graft()


def test_readers(run):
    run.path.mkdir(parents=True)
    run.metrics.write_text("step,train/loss,val/loss\n0,1.5,\n1,0.5,0.25\n2,")
    columns, rows = run.read_metrics()
    assert columns == ["step", "train/loss", "val/loss"]
    assert [row["train/loss"] for row in rows] == ["1.5", "0.5", ""] and rows[2]["val/loss"] is None
    run.fingerprint.write_text(json.dumps({"equal": True}))
    run.versions.write_text(json.dumps({"python": "3"}))
    assert run.read_fingerprint() == {"equal": True} and run.read_versions() == {"python": "3"}
    for stage in ("base", "epoch-001"):
        save_arrays(measurement_path(run.path, "sinks", stage), {"heads": np.arange(3)})
    save_arrays(measurement_path(run.path, "masking", "base"), {"heads": np.arange(2)})
    found = run.read_measurements("sinks")
    assert list(found) == ["base", "epoch-001"] and found["base"]["heads"].tolist() == [0, 1, 2]


def test_the_recipe_is_the_fit_s_and_else_the_job_s(run):
    run.job_config.parent.mkdir(parents=True)
    run.job_config.write_text(yaml.safe_dump({"by": "job"}))
    assert run.read_config() == {"by": "job"}
    run.config.write_text("by: [")
    assert run.read_config() == {"by": "job"}
    run.config.write_text(yaml.safe_dump({"by": "fit"}))
    assert run.read_config() == {"by": "fit"}


def test_reading_paths_tables_and_recipes_takes_no_torch():
    program = (
        "import sys, pathlib; from launch.run_folder import RunFolder; run = RunFolder(pathlib.Path('x'))\n"
        "run.read_metrics(), run.read_config(), run.faults(), run.graft, run.last_checkpoint\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
