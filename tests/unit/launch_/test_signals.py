"""Signals that are held back: what a process hears of them, what its children do, how it ends."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch import signals
from launch.signals import SignalRequest, stop_signal

ROOT = Path(signals.__file__).resolve().parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process of its own: pytest's must not block signals."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=60
    )


def test_blocked_signals_are_noticed_and_do_nothing():
    said = python(
        "import os, signal\nfrom launch import signals\nsignals.block_signals('fit')\nprint(signals.requested().name)\n"
        "for name in ('SIGUSR1', 'SIGUSR1', 'SIGTERM'):\n"
        "    os.kill(os.getpid(), signal.Signals[name])\n"
        "    print(signals.requested().name, signals.requested().status)\n"
    )
    assert said.stdout.split("\n")[:4] == ["NOTHING", "RESUME_LATER 75", "RESUME_LATER 75", "TERMINATE 143"]
    assert said.returncode == 0, said  # pending to the very end, and still not ended by them


def test_another_signal_can_be_chosen_and_the_usual_one_then_ends_as_ever():
    code = (
        "import os, signal\nfrom launch import signals\nsignals.block_signals('fit')\nos.kill(os.getpid(), signal.{})\n"
        + ("print(signals.requested().name)")
    )
    assert python(code.format("SIGUSR2"), REBLOCK_STOP_SIGNAL="USR2").stdout == "RESUME_LATER\n"
    assert python(code.format("SIGUSR1"), REBLOCK_STOP_SIGNAL="SIGUSR2").returncode == -signal.SIGUSR1


@pytest.mark.parametrize("name", ["USR9", "SIGKILL", "TERM", ""])
def test_a_signal_that_cannot_be_blocked_is_refused(monkeypatch, name):
    monkeypatch.setenv("REBLOCK_STOP_SIGNAL", name)
    with pytest.raises(ValueError, match="REBLOCK_STOP_SIGNAL="):
        stop_signal()


def test_a_wrong_name_is_one_line_before_anything_is_loaded():
    said = python("import sys; sys.argv = ['reblock', 'fit']; from launch.main import main; main()",
                  REBLOCK_STOP_SIGNAL="USR9")  # fmt: skip
    assert said.returncode == 2 and said.stderr.startswith("error: got REBLOCK_STOP_SIGNAL='USR9'")


def test_other_commands_end_as_ever():
    for command in ("inspect", "export"):
        code = f"import os\nfrom launch import signals\nsignals.block_signals('{command}')\nos.kill(os.getpid(), 15)"
        assert python(code).returncode == -signal.SIGTERM


def test_a_stopped_program_leaves_with_the_status_of_its_request():
    for request, status in ((SignalRequest.RESUME_LATER, 75), (SignalRequest.TERMINATE, 143)):
        code = (
            "from launch.signals import SignalRequest, Stopped\n"
            f"raise Stopped(SignalRequest({int(request)}), 'after step 3')"
        )
        assert python(code).returncode == status


CHILD = """
import os, signal, sys, time
from launch import signals
signals.block_signals("fit")
ready, theirs = os.pipe()
child = os.fork()
if child == 0:
    os.write(theirs, b"x")
    time.sleep(60)
    os._exit(3)
os.read(ready, 1)
os.kill(child, signal.SIGUSR1)
other = os.spawnlp(os.P_WAIT, "kill", "kill", "-TERM", str(child))  # as Slurm: not from the parent
time.sleep(0.5)
assert os.waitpid(child, os.WNOHANG) == (0, 0), "ended by a signal that was not its parent's"
os.kill(child, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_obeys_its_parent_only():
    said = python(CHILD)
    assert said.stdout == "0\n", said.stderr


AT_ONCE = """
import os, signal, sys, threading, time, types
from launch import main
sleeper = types.ModuleType("sleeper")
def encode():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.{})).start()
    try:
        time.sleep(60)
    finally:
        print("tidied up", flush=True)
sleeper.encode = encode
sys.modules["sleeper"] = sleeper
main.COMMANDS["encode"] = ("sleeper:encode", "sleeps")
sys.argv = ["reblock", "encode"]
main.main()
"""


@pytest.mark.parametrize("name, status", [("SIGUSR1", 75), ("SIGINT", 130), ("SIGTERM", -15)])
def test_encode_ends_at_once(name, status):
    said = python(AT_ONCE.format(name))
    assert said.returncode == status, said
    assert said.stdout == ("tidied up\n" if status > 0 else "")


def test_the_stop_signal_ends_a_background_job_that_ignores_ctrl_c():
    ignored = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    said = python(ignored + AT_ONCE.format("SIGUSR1"))
    assert (said.returncode, said.stdout) == (75, "tidied up\n"), said
