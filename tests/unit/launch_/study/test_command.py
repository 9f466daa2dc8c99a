"""The command of studies: work is divided, kept, and never done twice; faults are named before anything is loaded."""

import json
import re
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.main import main
from launch.study import command
from launch.study.config import part_of, read_share
from launch.study.study import Effort, Findings, Measured, Study, Table
from launch.study.workbench import Workbench

SIZE = ["--steps", "3", "--frames", "7", "--height", "32", "--width", "32", "--measured_steps", "2"]


class Counting(Study):
    """A study that counts what it is asked for."""

    name = "masking"  # its place in the list of studies
    question = "How often is each unit measured?"
    measured: ClassVar[list[str]] = []

    def __init__(self, *, variants: int = 3) -> None:
        self.count = variants

    def check(self, work):
        pass

    def variants(self, work):
        return [f"v-{i}" for i in range(self.count)]

    def effort(self, settings):
        return Effort()

    def measure(self, unit, work):
        self.measured.append(unit.key)
        return Measured({"value": np.array(unit.prompt + 10.0 * unit.seed)})

    def findings(self, results, work):
        rows = [[unit.key, float(results[unit]["value"])] for unit in results]
        return Findings(["found"], {"units": Table("Units", ("unit", "value"), rows)}, values={"rows": len(rows)})


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setitem(command.STUDIES, "masking", (f"{__name__}:Counting", "counts"))
    monkeypatch.setattr(Counting, "measured", [])
    return Counting


def test_units_are_measured_once_whatever_is_killed_and_shared(counting, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\nthree\n")
    out = ["--out", str(tmp_path), *SIZE, "--seeds", "[0,1]", "--prompts", str(prompts)]
    main(["study", "masking", *out, "--share", "0/2"])
    assert len(counting.measured) == 9 and "9 of 18 results are left to other processes" in capsys.readouterr().out
    (folder,) = (tmp_path / "masking").iterdir()
    assert not (folder / "report.html").exists()
    lost = sorted((folder / "results").iterdir())[0]
    lost.unlink()  # as if the process had been killed before it was written
    main(["study", "masking", *out])
    assert len(counting.measured) == 19 and sorted(counting.measured) == sorted([*set(counting.measured), lost.stem])
    assert len(set(counting.measured)) == 18
    main(["study", "masking", *out])
    assert len(counting.measured) == 19 and "18 of 18 results exist" in capsys.readouterr().out
    found = json.loads((folder / "findings.json").read_text())
    assert found == {"sentences": ["found"], "rows": 18}
    assert (folder / "units.csv").read_text().splitlines()[1] == "000-0-v-0,0.0"
    assert "found" in (folder / "report.html").read_text()
    main(["study", "masking", *out, "--variants", "1"])  # other options have results of their own
    assert len(counting.measured) == 19 + 6 and len(list((tmp_path / "masking").iterdir())) == 2


@given(st.integers(1, 9), st.integers(0, 40))
def test_every_unit_falls_to_exactly_one_process(count, units):
    parts = [part_of(range(units), i, count) for i in range(count)]
    assert [unit for part in parts for unit in part] == list(range(units))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_share_is_that_of_array_task_and_rank():
    assert read_share(None, {}) == (0, 1)
    assert read_share("2/5", {"RANK": "1", "WORLD_SIZE": "4"}) == (2, 5)
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"}
    assert read_share(None, array) == (2, 4)
    assert read_share(None, array | {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}) == (5, 8)
    for text in ("5/5", "1", "a/b", "-1/2"):
        with pytest.raises(ValueError, match="expected I/N"):
            read_share(text)


@pytest.mark.parametrize(
    "options, said",
    [
        (["--layers", "[8]"], r"got layers \[8\], expected different ones of 0 .. 7"),
        (["--heads", "[1,1]"], r"got heads \[1, 1\], expected different ones of 0 .. 3"),
        (["--measured_steps", "4"], "got measured_steps 4, expected 1 to 3"),
        (["--seeds", "[]"], r"got seeds \[\], expected one or more"),
        (["--frames", "8"], "got frames 8, expected 6 k"),
        (["--base", "nowhere"], "'nowhere' does not exist"),
        (["--laiers", "[1]"], "unrecognized arguments"),
    ],
)
def test_faults_are_named_before_anything_is_loaded(counting, tmp_path, capsys, monkeypatch, options, said):
    monkeypatch.setattr(Workbench, "denoiser", property(lambda self: pytest.fail("loaded")))
    with pytest.raises(SystemExit):
        main(["study", "masking", "--out", str(tmp_path / "out"), *SIZE, *options])
    error = capsys.readouterr().err
    assert re.search(said, error), error
    assert not (tmp_path / "out").exists() and counting.measured == []


def test_unknown_studies_and_prompts_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["study", "maskin"])
    assert "got study 'maskin', expected one of: " in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("one\n\none\n")
    with pytest.raises(SystemExit):
        main(["study", "masking", "--out", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt")])
    assert "got 2 prompts, 1 different" in capsys.readouterr().err
