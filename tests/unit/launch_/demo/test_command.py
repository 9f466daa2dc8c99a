"""The demo runs its stages in order, skips what is complete, and ends with the report's path."""

from pathlib import Path

import pytest

from launch.demo import command
from launch.demo.command import DemoStage, demo


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three stages in place of the demo's, the second of which has an output; names of those that were run."""
    ran: list[str] = []
    made = tmp_path / "demo" / "made"

    def make() -> None:
        ran.append("make")
        made.parent.mkdir(exist_ok=True)
        made.touch()

    def report() -> None:
        ran.append("report")
        print("report: page.html")

    monkeypatch.setattr(
        command,
        "_stages",
        lambda root, controls: [
            DemoStage("clips", "reblock synth x", lambda: ran.append("clips")),
            DemoStage("base", "reblock plant y", make, made),
            DemoStage("report", "reblock report z", report),
        ],
    )
    return ran


def test_every_stage_shows_its_command_and_the_last_line_is_the_reports(stages, tmp_path, capsys):
    demo(root=tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert stages == ["clips", "make", "report"]
    assert [line for line in lines if line.startswith("[")] == [
        "[1/3] clips: reblock synth x", "[2/3] base: reblock plant y", "[3/3] report: reblock report z",
    ]  # fmt: skip
    assert lines[-1] == "report: page.html"


def test_a_second_call_skips_what_is_complete(stages, tmp_path, capsys):
    demo(root=tmp_path)
    demo(root=tmp_path)
    assert stages == ["clips", "make", "report", "clips", "report"]
    assert "demo/made exists and is kept" in capsys.readouterr().out


def test_fresh_removes_what_an_earlier_demo_left_and_nothing_else(stages, tmp_path):
    demo(root=tmp_path)
    (tmp_path / "other").mkdir()
    demo(root=tmp_path, fresh=True)
    assert stages == ["clips", "make", "report"] * 2 and (tmp_path / "other").is_dir()


def test_the_fit_has_a_rank_for_each_of_two_cores(monkeypatch, tmp_path):
    for cores, expected in (({0}, ["1", "auto"]), ({0, 1, 2, 3}, ["2", "ddp"])):
        monkeypatch.setattr(command.os, "sched_getaffinity", lambda pid, cores=cores: cores)
        arguments = command._fit_arguments(tmp_path / "demo", tmp_path / "base", tmp_path / "l")
        options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
        assert [options["--trainer.devices"], options["--trainer.strategy"]] == expected


def test_controls_run_before_the_comparison_and_the_report(tmp_path):
    plain, whole = ([stage.name for stage in command._stages(tmp_path, controls)] for controls in (False, True))
    assert whole == [*plain[:-1], "control flow", "control keep", "control sham", "control untrained", "comparison",
                     "report"]  # fmt: skip
    stages = {stage.name: stage for stage in command._stages(tmp_path, True)}
    keep = stages["control keep"]
    overlays = [word for word in keep.command.split() if word.startswith("--config=")]
    assert [Path(word).stem for word in overlays] == ["demo", "flow", "keep"]
    assert all(Path(word.partition("=")[2]).is_file() for word in overlays)
    assert keep.output == tmp_path / "demo-keep" / "graft.safetensors"
    assert stages["comparison"].command.split()[2:] == [
        *(str(tmp_path / name) for name in ("demo", "demo-flow", "demo-keep", "demo-sham", "demo-untrained")),
        "--out", str(tmp_path / "demo" / "compare.html"),
    ]  # fmt: skip


def test_a_fit_that_fails_ends_the_demo_with_its_status():
    with pytest.raises(SystemExit) as stop:
        command._fit(["fit", "--config=nowhere.yaml"])
    assert stop.value.code == 2
