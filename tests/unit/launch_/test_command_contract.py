"""What every command promises: help, and faults in a few lines with exit status 2. All in one process."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from launch import main as command

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "recipes" / "demo.yaml")

#: Command -> arguments whose fault is in what they name: a file that is not there, or a value that cannot be.
FAULTY: dict[str, list[str]] = {
    "synth": ["out", "--clips=0"],
    "synth-latents": ["out", "--base=nowhere"],
    "pack": ["nowhere", "out"],
    "encode": ["nowhere", "out", "--base=nowhere"],
    "inspect": ["nowhere"],
    "plant": ["nowhere", "out", "--shards=nowhere", "--heads=[]"],
    "pipeline": ["out", "--vae=nowhere"],
    "plan": ["--config=nowhere.yaml"],
    "fit": ["--config=nowhere.yaml"],
    "validate": ["--config=nowhere.yaml"],
    "submit": ["--config=nowhere.yaml"],
    "status": ["nowhere"],
    "export": ["nowhere", "out"],
    "sample": ["out", "--base=nowhere"],
    "report": ["nowhere"],
    "study": ["sinks", "--out=out", "--base=nowhere"],
    "compare": ["nowhere", "somewhere"],
    "bench": ["nothing"],
    "demo": ["--root=1", "--fresh=perhaps"],
}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)


def required(name: str) -> list[str]:
    """Some value for each argument that a command cannot do without."""
    if name == "bench":
        return ["step"]  # each benchmark has options of its own
    if name == "study":
        return ["sinks", "--out=out"]
    if name in command.RAW:
        return ["--config", RECIPE]
    module, function = command.COMMANDS[name][0].split(":")
    parameters = inspect.signature(getattr(import_module(module), function)).parameters.values()
    needed = [p for p in parameters if p.default is p.empty]
    return [f"--{p.name}=x" if p.kind is p.KEYWORD_ONLY else "x" for p in needed]


def refusal(capsys, name: str, *argv: str) -> str:
    """What a command says when it refuses, to standard error."""
    with pytest.raises(SystemExit) as stop:
        command.main([name, *argv])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert said.startswith("error: ") and "Traceback" not in said and "usage:" not in said, said
    assert len(said.splitlines()) <= 6, said
    return said


def test_every_command_is_tried():
    assert FAULTY.keys() == command.COMMANDS.keys()


@pytest.mark.parametrize("name", command.COMMANDS)
def test_help_is_printed(name, capsys):
    status = 0
    try:
        command.main([name, "--help"])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr()
    assert status == 0 and said.err == ""
    assert re.match(rf"usage: reblock (\[options\] )?{name} ", said.out), said.out


@pytest.mark.parametrize("name", command.COMMANDS)
def test_an_unknown_option_is_named_with_those_that_exist(name, capsys, tmp_path):
    said = refusal(capsys, name, *required(name), "--no_such_option=1")
    assert "no_such_option" in said and "accepted here: " in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", command.COMMANDS)
def test_a_fault_is_a_few_lines_and_leaves_nothing(name, capsys, tmp_path):
    said = refusal(capsys, name, *FAULTY[name])
    assert any(argument.rpartition("=")[2] in said for argument in FAULTY[name]), said
    assert not list(tmp_path.iterdir())
