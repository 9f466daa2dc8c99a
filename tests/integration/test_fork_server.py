"""A program that a fork server starts is as one that a new interpreter starts."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fork_server import ROOT, Forked, Process, popen

SAYS = """
import json, os, random, sys, threading
import numpy, torch
json.dump({
    "argv": sys.argv, "path": sys.path[0], "cwd": os.getcwd(), "name": __name__, "mine": os.environ.get("MINE"),
    "path_variable": "PATH" in os.environ, "session": os.getsid(0) == os.getpid(), "hash": hash("a"),
    "seed": torch.initial_seed(), "random": random.random(), "numpy": float(numpy.random.rand()),
    "threads": torch.get_num_threads(), "file": globals().get("__file__"),
    "main": sys.modules["__main__"].__dict__ is globals(),
}, sys.stdout)
"""


def started(*arguments: str, **options) -> Process:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("more", {})
    return popen([sys.executable, *arguments], env=environment, **options)


def said(folder: Path, *arguments: str, start=started, **options) -> dict:
    process = start(*arguments, cwd=folder, stdout=subprocess.PIPE, more={"MINE": "7"}, **options)
    output = process.stdout.read()
    process.stdout.close()
    assert process.wait(60) == 0
    return json.loads(output)


def new_interpreter(*arguments: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | options.pop("more")
    return subprocess.Popen([sys.executable, *arguments], env=environment, **options)


@pytest.mark.slow
@pytest.mark.parametrize("script", [True, False])
def test_a_forked_program_finds_what_a_new_interpreter_gives_it(tmp_path, script):
    path = tmp_path / "says.py"
    path.write_text(SAYS)
    arguments = [str(path), "x", "y"] if script else ["-c", SAYS, "x", "y"]
    forked = [said(tmp_path, *arguments, start_new_session=True) for _ in range(4)]
    fresh = said(tmp_path, *arguments, start_new_session=True, start=new_interpreter)
    drawn = ("hash", "random", "numpy", "seed")
    for found in forked:
        assert {k: v for k, v in found.items() if k not in drawn} == {k: v for k, v in fresh.items() if k not in drawn}
    assert len({found["hash"] for found in forked}) == 2
    assert all(len({found[generator] for found in forked}) == 4 for generator in ("random", "numpy", "seed"))


def test_a_program_ends_as_it_would():
    for code, status in (("raise SystemExit(3)", 3), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)):
        process = started("-c", code, stderr=subprocess.PIPE, text=True)
        assert isinstance(process, Forked) and process.wait(60) == process.returncode == status
        assert ("ZeroDivisionError" in process.stderr.read()) == (status == 1)
        process.stderr.close()


def test_a_program_is_signalled_and_waited_for():
    process = started("-c", "import time; time.sleep(600)", start_new_session=True)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.1)
    assert process.poll() is None and os.getsid(process.pid) == process.pid
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == -signal.SIGTERM
    process.kill()  # has ended: nothing happens


def test_another_environment_of_the_interpreter_gets_an_interpreter():
    process = started("-c", "import sys; sys.exit(len(sys.warnoptions))", more={"PYTHONWARNINGS": "ignore"})
    assert isinstance(process, subprocess.Popen) and process.wait(60) == 1
