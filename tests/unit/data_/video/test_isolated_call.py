"""Calls that may hang or crash, in a process of their own."""

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

from data.encode.process_identity import process_start
from data.video.isolated_call import IsolatedCall
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="calls run in a process of their own on Linux only")
ROOT = Path(__file__).resolve().parents[4]


def run_case(what):
    if what == "hang":
        time.sleep(600)
    if what == "crash":
        os.kill(os.getpid(), signal.SIGTRAP)
    if what == "exit":
        os._exit(3)
    if what == "value":
        raise ValueError("it is no video")
    if what == "bug":
        raise ZeroDivisionError("a bug")
    return os.getpid() if what == "pid" else np.full(what, 7, np.uint8)


def test_one_process_serves_all_calls():
    call = IsolatedCall(60.0)
    assert len({call(run_case, "pid") for _ in range(3)} - {os.getpid()}) == 1
    assert call(run_case, 3 << 20).sum() == 7 * (3 << 20)


@pytest.mark.parametrize(
    ("what", "why"),
    [("hang", "longer than 0.5 s"), ("crash", "signal 5"), ("exit", "status 3"), ("value", "no video")],
)
def test_a_hang_or_crash_costs_its_call_and_no_other(what, why):
    call = IsolatedCall(0.5)
    for _ in range(2):
        call.deadline = 60.0
        before = call(run_case, "pid")
        call.deadline = 0.5 if what == "hang" else 60.0
        with pytest.raises(ValueError, match=why):
            call(run_case, what)
        call.deadline = 60.0
        assert (call(run_case, "pid") == before) == (what == "value")
        assert process_start(before) is None or what == "value"


def test_other_errors_propagate():
    with pytest.raises(ZeroDivisionError, match="a bug"):
        IsolatedCall(60.0)(run_case, "bug")


def test_threads_take_turns_and_a_fork_gets_a_process_of_its_own():
    call, found = IsolatedCall(60.0), []
    threads = [threading.Thread(target=lambda: found.append(call(run_case, "pid"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 8 and len(set(found)) == 1
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(theirs, str(call(run_case, "pid")).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    assert int(os.read(ours, 100)) != found[0] and call(run_case, "pid") == found[0]
    os.close(ours)
    os.close(theirs)


def test_a_copy_has_the_same_deadline_which_must_be_positive():
    assert copy.copy(IsolatedCall(3.0)).deadline == 3.0
    with pytest.raises(ValueError, match="got deadline 0"):
        IsolatedCall(0)


@pytest.mark.slow
def test_a_hanging_call_ends_when_its_parent_is_killed():
    code = (
        "from tests.unit.data_.video.test_isolated_call import run_case\n"
        "from data.video.isolated_call import IsolatedCall\nf = IsolatedCall(600.0)\n"
        "print(f(run_case, 'pid'), flush=True); f(run_case, 'hang')"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.kill()
        wait_until(lambda: process_start(child) is None, message="the process still runs")
