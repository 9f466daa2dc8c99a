"""Calls that may hang or crash, in a process beside this one."""

import copy
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.encode.claims import process_start
from data.video.isolated_call import Fenced

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="calls are fenced on Linux")
ROOT = Path(__file__).resolve().parents[4]


def act(what):
    if what == "hang":
        time.sleep(600)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGTRAP)
    if what == "leave":
        os._exit(3)
    if what == "value":
        raise ValueError("it is no video")
    if what == "bug":
        raise ZeroDivisionError("ours")
    return os.getpid() if what == "pid" else np.full(what, 7, np.uint8)


def test_results_travel_and_one_process_serves_all_calls():
    fenced = Fenced(60.0)
    assert len({fenced(act, "pid") for _ in range(3)} - {os.getpid()}) == 1
    assert fenced(act, 3 << 20).sum() == 7 * (3 << 20)


@pytest.mark.parametrize(
    ("what", "why"),
    [("hang", "longer than 0.5 s"), ("crash", "signal 5"), ("leave", "status 3"), ("value", "no video")],
)
def test_a_disaster_costs_its_call_and_no_other(what, why):
    fenced = Fenced(0.5)
    for _ in range(2):
        fenced.deadline = 60.0
        before = fenced(act, "pid")
        fenced.deadline = 0.5 if what == "hang" else 60.0
        with pytest.raises(ValueError, match=why):
            fenced(act, what)
        fenced.deadline = 60.0
        assert (fenced(act, "pid") == before) == (what == "value")
        assert process_start(before) is None or what == "value"


def test_errors_of_ours_propagate():
    with pytest.raises(ZeroDivisionError, match="ours"):
        Fenced(60.0)(act, "bug")


def test_threads_take_turns_and_a_fork_gets_a_process_of_its_own():
    fenced, found = Fenced(60.0), []
    threads = [threading.Thread(target=lambda: found.append(fenced(act, "pid"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8 and len(set(found)) == 1
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(theirs, str(fenced(act, "pid")).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert int(os.read(ours, 100)) != found[0] and fenced(act, "pid") == found[0]
    os.close(ours)
    os.close(theirs)


def test_a_copy_has_a_process_of_its_own_and_time_is_needed():
    assert copy.copy(Fenced(3.0)).deadline == 3.0
    with pytest.raises(ValueError, match="got deadline 0"):
        Fenced(0)


@pytest.mark.slow
def test_what_hangs_does_not_survive_a_parent_that_is_killed():
    code = (
        "from tests.unit.data_.video.test_isolated_call import act\n"
        "from data.video.isolated_call import Fenced\nf = Fenced(600.0)\n"
        "print(f(act, 'pid'), flush=True); f(act, 'hang')"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        deadline = time.monotonic() + 60
        while process_start(child) is not None:
            assert time.monotonic() < deadline, "it lives on"
            time.sleep(0.02)
