"""Items that hang, crash or are killed, and a parent that is killed: real processes, no mocks."""

import contextlib
import ctypes
import gc
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from data.encode.process_identity import process_start
from data.video.probe import probe_video
from data.video.worker_pool import Failure, WorkerPool
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[4]


def double(item):
    return 2 * item


def process_id(_):
    return os.getpid()


def run_case(item):
    """Fails in the way that the item names."""
    match item:
        case "hang":
            while True:
                pass
        case "crash":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "value":
            raise ValueError("is no clip")
        case "missing":
            Path("/no/such/clip").read_bytes()
        case "unicode":
            b"\xff".decode()
        case "bug":
            return {}["no such key"]
        case "local":
            return lambda: 0
        case "no message":
            raise ValueError
    return item


def wait_if_path(path):
    return wait_forever(path) if path else None


def wait_forever(path):
    """Writes its process id to `path`, then waits until it is killed."""
    Path(path).write_text(str(os.getpid()))
    while True:
        signal.pause()


def killed_while_sending(item):
    """Imitates a kill while a large result is being sent: the pipe holds a part of it."""
    if item == 0:
        pipe = next(thing for thing in gc.get_objects() if isinstance(thing, Connection) and thing.writable)
        os.write(pipe.fileno(), struct.pack("!i", 1 << 20) + b"part of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_results_come_in_the_order_of_the_items():
    with WorkerPool(2, deadline=60) as pool:
        assert list(pool.map(double, range(50))) == [2 * i for i in range(50)]
        assert list(pool.map(double, [])) == []  # and a pool serves more than once
        assert len(set(pool.map(process_id, range(20)))) <= 2


def test_each_failure_costs_its_item_and_no_other():
    items = ["a", "crash", "b", "kill", "exit", "value", "hang", "missing", "c", "unicode", "no message", "d"]
    with WorkerPool(2, deadline=1.0) as pool:
        got = dict(zip(items, pool.map(run_case, items), strict=True))
    assert {name: result for name, result in got.items() if not isinstance(result, Failure)} == {n: n for n in "abcd"}
    reasons = {name: result.reason for name, result in got.items() if isinstance(result, Failure)}
    assert reasons["crash"] == "the decoder crashed (signal 11)"
    assert reasons["kill"] == "its process was killed (signal 9; out of memory?)"
    assert reasons["exit"] == "its process ended by itself (exit status 3)"
    assert reasons["hang"] == "took longer than 1 s"
    assert reasons["value"] == "is no clip" and reasons["no message"] == "ValueError"
    assert "/no/such/clip" in reasons["missing"] and "can't decode byte" in reasons["unicode"]


def test_one_worker_is_replaced_as_often_as_it_crashes():
    with WorkerPool(1, deadline=60) as pool:
        got = list(pool.map(run_case, ["exit", 1, "exit", "exit", "exit", "exit", 2]))
    assert [isinstance(result, Failure) for result in got] == [True, False, True, True, True, True, False]


def test_a_worker_killed_while_it_is_idle_is_replaced():
    with WorkerPool(1, deadline=60) as pool:
        results = pool.map(process_id, range(4), ahead=1)
        first = next(results)
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: process_start(first) is None)
        rest = list(results)  # the item that was under way may be lost, no other
    assert sum(isinstance(result, Failure) for result in rest) <= 1
    assert first not in rest and len(rest) == 3


def test_a_clip_that_never_arrives_exceeds_its_deadline(tmp_path):
    os.mkfifo(tmp_path / "never.mp4")
    with WorkerPool(1, deadline=0.5) as pool:
        (got,) = pool.map(probe_video, [tmp_path / "never.mp4"])
    assert got == Failure("took longer than 0.5 s")


def test_the_deadline_counts_from_the_start_of_an_item_and_not_while_results_wait():
    deadline = 4.0  # an item is done in far less on any machine, so that none fails by its own time
    with WorkerPool(2, deadline=deadline) as pool:
        results = pool.map(double, range(8), ahead=8)
        got = [next(results)]
        until = time.monotonic() + 1.5 * deadline  # a consumer that takes longer than the deadline
        wait_until(lambda: time.monotonic() > until)
        assert got + list(results) == [2 * i for i in range(8)]


def test_no_more_items_are_taken_than_asked_for():
    taken = []

    def items():
        for i in range(30):
            taken.append(i)
            yield i

    with WorkerPool(2, deadline=60) as pool:
        for count, _ in enumerate(pool.map(double, items(), ahead=3), start=1):
            assert len(taken) <= count + 3
    assert len(taken) == 30


def test_items_are_processed_while_the_consumer_is_busy():
    taken = []
    with WorkerPool(1, deadline=60) as pool:
        results = pool.map(double, (taken.append(i) or i for i in range(30)), ahead=6)
        next(results)
        wait_until(lambda: len(taken) >= 6)  # nobody asks for a result meanwhile


def test_large_items_and_results_are_sent():
    big = np.arange(3_000_000, dtype=np.int32)
    with WorkerPool(2, deadline=60) as pool:
        for result in pool.map(double, [big] * 4):
            assert np.array_equal(result, 2 * big)


def test_a_worker_killed_while_sending_a_result_affects_no_other():
    with WorkerPool(2, deadline=60) as pool:
        got = list(pool.map(killed_while_sending, range(6)))
    assert got[0] == Failure("its process was killed (signal 9; out of memory?)") and got[1:] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("item, error", [("bug", KeyError), ("local", TypeError)])
def test_errors_that_are_not_the_items_fault_propagate_after_the_results_before_them(item, error):
    got = []
    with WorkerPool(2, deadline=60) as pool, pytest.raises(error):
        got.extend(result for result in pool.map(run_case, [1, 2, item, 3]) if got.append(result))
    assert got == [1, 2]


def test_errors_of_the_items_propagate():
    def items():
        yield 1
        raise RuntimeError("the list of clips ends here")

    with WorkerPool(1, deadline=60) as pool:
        results = pool.map(double, items())
        assert next(results) == 2
        with pytest.raises(RuntimeError, match="ends here"):
            next(results)
        with pytest.raises((AttributeError, TypeError)):  # the function cannot be pickled either
            list(pool.map(lambda item: item, [1]))


@pytest.mark.parametrize("how", ["error", "break", "exit"])
def test_the_workers_end_at_once_when_the_iteration_ends_early(tmp_path, how):
    mark = tmp_path / "begun"
    began = time.monotonic()
    with contextlib.suppress(RuntimeError), WorkerPool(2, deadline=600) as pool:
        results = pool.map(wait_if_path, [None, mark])
        assert next(results) is None
        wait_until(lambda: mark.exists() and mark.read_text())
        if how == "error":
            raise RuntimeError
        if how == "break":
            results.close()
    wait_until(lambda: process_start(int(mark.read_text())) is None)
    assert time.monotonic() - began < 30


def test_the_workers_end_while_the_pool_waits_for_the_next_item(tmp_path):
    mark, forever = tmp_path / "begun", threading.Event()

    def items():
        yield None
        yield mark
        forever.wait()

    with WorkerPool(2, deadline=600) as pool:
        results = pool.map(wait_if_path, items())
        next(results)
        wait_until(lambda: mark.exists() and mark.read_text())
    wait_until(lambda: process_start(int(mark.read_text())) is None)
    forever.set()


def run_parent(tmp_path, *, then):
    """A process whose two workers hang; `then` is called with it, and all three have to end."""
    marks = [tmp_path / name for name in "ab"]
    code = (
        "import sys, tests.unit.data_.video.test_worker_pool as t\n"
        "from data.video.worker_pool import WorkerPool\n"
        "if __name__ == '__main__':\n"
        "    with WorkerPool(2, deadline=600) as pool:\n"
        "        list(pool.map(t.wait_forever, sys.argv[1:]))\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), *map(str, marks)]
    parent = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        wait_until(lambda: all(mark.exists() and mark.read_text() for mark in marks), 60)
        pids = [int(mark.read_text()) for mark in marks]
        assert all(map(process_start, pids))
        then(parent)
        wait_until(lambda: not any(map(process_start, pids)))
        parent.wait(20)
        return parent.stderr.read().decode()
    finally:
        parent.kill()
        parent.wait()
        parent.stderr.close()


@pytest.mark.slow
def test_hanging_workers_end_when_their_parent_is_killed(tmp_path):
    run_parent(tmp_path, then=lambda parent: parent.kill())


@pytest.mark.slow
def test_ctrl_c_ends_the_run_and_its_workers(tmp_path):
    stderr = run_parent(tmp_path, then=lambda parent: os.killpg(parent.pid, signal.SIGINT))
    assert stderr.rstrip().endswith("KeyboardInterrupt") and stderr.count("Traceback") == 1


@pytest.mark.parametrize("processes, deadline", [(0, 1), (1, 0), (1, float("nan"))])
def test_invalid_settings_are_refused(processes, deadline):
    with pytest.raises(ValueError, match="expected at least 1"):
        WorkerPool(processes, deadline)
    with pytest.raises(ValueError, match="ahead 0"):
        WorkerPool(1, 1).map(double, [1], ahead=0)
