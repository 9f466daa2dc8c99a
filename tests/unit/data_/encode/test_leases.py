"""Leases: one owner at a time, expired leases are taken over, slow owners lose theirs without damage."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.encode.leases import Leases
from data.encode.process_identity import process_start
from tests.support.waiting import wait_until

NAME = "19x64x64-000000.json"
_ACQUIRE_AND_WAIT = """
import sys, time
from pathlib import Path
from data.encode.leases import Leases
leases = Leases(Path(sys.argv[1]), 60)
assert leases.acquire(sys.argv[2])
print("acquired", flush=True)
time.sleep(600)
"""


def elsewhere(folder, timeout=60.0):
    """Leases of a process on another host."""
    leases = Leases(folder, timeout)
    leases._namespace = "elsewhere"
    return leases


def age(path, seconds):
    stamp = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(stamp, stamp))


@pytest.fixture
def killed(tmp_path):
    """A process that owns the lease `NAME`; tests kill it, and nobody waits for it before the test ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", _ACQUIRE_AND_WAIT, str(tmp_path), NAME],
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
    )  # fmt: skip
    assert process.stdout.readline() == b"acquired\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_of_many_processes_acquires_a_lease(tmp_path):
    owners = [Leases(tmp_path) for _ in range(8)]
    for number in range(30):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda leases, n=number: leases.acquire(f"{n}"), owners)) == 1


def test_a_released_lease_can_be_acquired(tmp_path):
    first, second = Leases(tmp_path), elsewhere(tmp_path)
    assert first.acquire(NAME) and not second.acquire(NAME) and not first.acquire(NAME)
    assert f"process {os.getpid()} on " in second.describe_owner(NAME)
    first.release(NAME)
    assert second.describe_owner(NAME) is None and second.acquire(NAME)


def test_the_end_of_the_context_releases_all_leases_and_acquires_no_more(tmp_path):
    with Leases(tmp_path) as leases:
        assert leases.acquire("a") and leases.acquire("b")
    assert not leases.acquire("c")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_the_lease_of_a_killed_owner_on_this_host_expires_at_once(tmp_path, killed):
    leases = Leases(tmp_path, timeout=3600)
    assert not leases.acquire(NAME)
    os.kill(killed.pid, signal.SIGKILL)
    wait_until(lambda: process_start(killed.pid) is None)
    assert leases.acquire(NAME) and leases.owns(NAME)


def test_a_reused_process_id_is_another_process(tmp_path):
    first = Leases(tmp_path)
    assert first.acquire(NAME)
    lease = tmp_path / NAME
    lease.write_text(lease.read_text().replace(f'"started": "{process_start(os.getpid())}"', '"started": "1"'))
    assert Leases(tmp_path).acquire(NAME)


def test_the_lease_of_another_host_expires_without_heartbeats(tmp_path):
    assert elsewhere(tmp_path).acquire(NAME)
    leases = Leases(tmp_path, timeout=60)
    age(tmp_path / NAME, 50)
    assert not leases.acquire(NAME)
    age(tmp_path / NAME, 15)
    assert leases.acquire(NAME)


def test_an_empty_lease_expires_only_by_its_age(tmp_path):
    (tmp_path / NAME).touch()  # killed between creating and writing it
    leases = Leases(tmp_path, timeout=60)
    assert not leases.acquire(NAME)
    age(tmp_path / NAME, 61)
    assert leases.acquire(NAME)


def test_heartbeats_keep_a_lease(tmp_path):
    with elsewhere(tmp_path, timeout=0.3) as owner:
        assert owner.acquire(NAME)
        age(tmp_path / NAME, 3600)
        observer = Leases(tmp_path, timeout=5)
        wait_until(lambda: not observer.is_stale(tmp_path / NAME))
        assert not observer.acquire(NAME)


def test_one_of_many_processes_takes_an_expired_lease_over(tmp_path):
    for number in range(30):
        name, barrier = f"{number}", threading.Barrier(6)
        assert elsewhere(tmp_path).acquire(name)
        age(tmp_path / name, 100)

        def acquire(leases, name=name, barrier=barrier):
            barrier.wait()
            return leases.acquire(name)

        owners = [Leases(tmp_path, timeout=60) for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(acquire, owners))
        assert sum(won) == 1 and owners[won.index(True)].owns(name)


def test_a_lease_created_during_the_takeover_of_its_predecessor_is_given_back(tmp_path):
    assert elsewhere(tmp_path).acquire(NAME)
    slow, fast = Leases(tmp_path, timeout=60), Leases(tmp_path, timeout=60)
    age(tmp_path / NAME, 100)
    state = slow._read_state(tmp_path / NAME)
    assert fast.acquire(NAME)
    assert not slow._remove_expired(tmp_path / NAME, state)
    assert fast.owns(NAME) and not list(tmp_path.glob(".*.expired"))


def test_a_slow_owner_sees_that_it_lost_its_lease_and_does_not_touch_its_successors(tmp_path):
    slow = elsewhere(tmp_path)
    assert slow.acquire(NAME)
    age(tmp_path / NAME, 100)
    fast = Leases(tmp_path, timeout=60)
    assert fast.acquire(NAME)
    assert not slow.owns(NAME) and fast.owns(NAME)
    slow.release(NAME)
    assert fast.owns(NAME)


def test_remove_leaves_nothing(tmp_path):
    folder = tmp_path / "leases"
    leases = Leases(folder)
    assert leases.acquire("a") and not Leases(folder).acquire("a")
    (folder / ".a.0123.expired").touch()
    leases.remove(["a", "b"])
    assert not folder.exists()


@pytest.mark.parametrize("links", [True, False])
def test_all_processes_read_what_the_first_one_wrote(tmp_path, monkeypatch, links):
    def refuse(*args):
        raise OSError(95, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    owners = [Leases(tmp_path / "leases") for _ in range(8)]
    for number in range(20):
        barrier = threading.Barrier(8)

        def write(place, name=f"{number}", barrier=barrier):
            barrier.wait()
            return owners[place].write_once(name, f"{place}" * 100_000)

        with ThreadPoolExecutor(8) as pool:
            contents = set(pool.map(write, range(8)))
        assert len(contents) == 1 and len(contents.pop()) == 100_000
    assert not list((tmp_path / "leases").glob("*.part"))


def test_a_file_is_written_again_when_the_folder_is_removed(tmp_path):
    leases = Leases(tmp_path / "leases")
    stop = threading.Event()

    def remove():
        while not stop.is_set():
            leases.remove(["settings"])

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        assert all(0 <= int(leases.write_once("settings", f"{number}")) <= number for number in range(200))
    finally:
        stop.set()
        thread.join()


def test_leases_are_acquired_while_another_process_removes_the_folder(tmp_path):
    owner, other = Leases(tmp_path / "leases"), elsewhere(tmp_path / "leases")
    stop = threading.Event()

    def remove():
        while not stop.is_set():
            other.remove([])

    thread = threading.Thread(target=remove)
    thread.start()
    try:
        taken = 0
        for _ in range(2000):
            if owner.acquire(NAME):
                taken += owner.owns(NAME)
                owner.release(NAME)
    finally:
        stop.set()
        thread.join()
    assert taken > 0


def test_the_folder_stays_while_another_process_has_a_lease_in_it(tmp_path):
    folder = tmp_path / "leases"
    mine, other = Leases(folder), elsewhere(folder)
    mine.write_once("settings", "x")
    assert other.acquire(NAME)
    mine.remove_if_unused("settings")
    assert (folder / "settings").exists() and other.owns(NAME)
    other.release(NAME)
    mine.remove_if_unused("settings")
    mine.remove_if_unused("settings")
    assert not folder.exists()


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_not_positive_is_refused(tmp_path, timeout):
    with pytest.raises(ValueError, match="expected seconds above 0"):
        Leases(tmp_path, timeout)
