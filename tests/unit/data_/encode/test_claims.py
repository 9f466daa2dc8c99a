"""Claims: one owner at a time, the dead are found out, the slow lose without harm."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data.encode.claims import Claims, process_start, start_position

NAME = "19x64x64-000000.json"
_CLAIM_AND_STAY = """
import sys, time
from pathlib import Path
from data.encode.claims import Claims
claims = Claims(Path(sys.argv[1]), 60)
assert claims.take(sys.argv[2])
print("claimed", flush=True)
time.sleep(600)
"""


def elsewhere(folder, timeout=60.0):
    """Claims of a process on another host."""
    claims = Claims(folder, timeout)
    claims._place = "elsewhere"
    return claims


def age(path, seconds):
    stamp = path.stat().st_mtime_ns - int(seconds * 1e9)
    os.utime(path, ns=(stamp, stamp))


@pytest.fixture
def killed(tmp_path):
    """A claim whose owner was killed and is not even reaped."""
    process = subprocess.Popen(
        [sys.executable, "-c", _CLAIM_AND_STAY, str(tmp_path), NAME],
        stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])},
    )  # fmt: skip
    assert process.stdout.readline() == b"claimed\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_of_many_gets_it(tmp_path):
    owners = [Claims(tmp_path) for _ in range(8)]
    for number in range(30):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(lambda claims, n=number: claims.take(f"{n}"), owners)) == 1


def test_what_is_given_back_can_be_taken(tmp_path):
    first, second = Claims(tmp_path), elsewhere(tmp_path)
    assert first.take(NAME) and not second.take(NAME) and not first.take(NAME)
    assert f"process {os.getpid()} on " in second.holder(NAME)
    first.release(NAME)
    assert second.holder(NAME) is None and second.take(NAME)


def test_the_end_of_the_context_gives_all_back_and_claims_no_more(tmp_path):
    with Claims(tmp_path) as claims:
        assert claims.take("a") and claims.take("b")
    assert not claims.take("c")
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == []


def test_a_killed_owner_on_this_host_is_found_out_at_once(tmp_path, killed):
    claims = Claims(tmp_path, timeout=3600)
    assert not claims.take(NAME)
    os.kill(killed.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while process_start(killed.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert claims.take(NAME) and claims.holds(NAME)


def test_a_process_id_used_again_is_another_process(tmp_path):
    first = Claims(tmp_path)
    assert first.take(NAME)
    claim = tmp_path / NAME
    claim.write_text(claim.read_text().replace(f'"started": "{process_start(os.getpid())}"', '"started": "1"'))
    assert Claims(tmp_path).take(NAME)


def test_an_owner_on_another_host_is_dead_when_it_gives_no_sign(tmp_path):
    assert elsewhere(tmp_path).take(NAME)
    claims = Claims(tmp_path, timeout=60)
    age(tmp_path / NAME, 50)
    assert not claims.take(NAME)
    age(tmp_path / NAME, 15)
    assert claims.take(NAME)


def test_a_claim_without_a_word_is_dead_only_by_its_age(tmp_path):
    (tmp_path / NAME).touch()  # killed between making and writing it
    claims = Claims(tmp_path, timeout=60)
    assert not claims.take(NAME)
    age(tmp_path / NAME, 61)
    assert claims.take(NAME)


def test_a_live_owner_keeps_its_claim_young(tmp_path):
    with elsewhere(tmp_path, timeout=0.3) as owner:
        assert owner.take(NAME)
        age(tmp_path / NAME, 3600)
        judge = Claims(tmp_path, timeout=5)
        deadline = time.monotonic() + 10
        while judge.is_old(tmp_path / NAME) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not judge.take(NAME)


def test_of_many_that_take_over_a_dead_claim_one_gets_it(tmp_path):
    for number in range(30):
        name, barrier = f"{number}", threading.Barrier(6)
        assert elsewhere(tmp_path).take(name)
        age(tmp_path / name, 100)

        def take(claims, name=name, barrier=barrier):
            barrier.wait()
            return claims.take(name)

        owners = [Claims(tmp_path, timeout=60) for _ in range(6)]
        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(take, owners))
        assert sum(won) == 1 and owners[won.index(True)].holds(name)


def test_a_claim_made_anew_while_its_dead_forerunner_was_judged_goes_back(tmp_path):
    assert elsewhere(tmp_path).take(NAME)
    slow, quick = Claims(tmp_path, timeout=60), Claims(tmp_path, timeout=60)
    age(tmp_path / NAME, 100)
    judged = slow._look(tmp_path / NAME)
    assert quick.take(NAME)
    assert not slow._bury(tmp_path / NAME, judged)
    assert quick.holds(NAME) and not list(tmp_path.glob(".*.dead"))


def test_an_owner_that_was_slow_sees_that_it_lost_and_leaves_its_successor_alone(tmp_path):
    slow = elsewhere(tmp_path)
    assert slow.take(NAME)
    age(tmp_path / NAME, 100)
    quick = Claims(tmp_path, timeout=60)
    assert quick.take(NAME)
    assert not slow.holds(NAME) and quick.holds(NAME)
    slow.release(NAME)
    assert quick.holds(NAME)


def test_clear_leaves_nothing(tmp_path):
    folder = tmp_path / "claims"
    claims = Claims(folder)
    assert claims.take("a") and not Claims(folder).take("a")
    (folder / ".a.0123.dead").touch()
    claims.clear(["a", "b"])
    assert not folder.exists()


@pytest.mark.parametrize("links", [True, False])
def test_the_first_word_stands_whole_for_all(tmp_path, monkeypatch, links):
    def refuse(*args):
        raise OSError(95, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    owners = [Claims(tmp_path / "claims") for _ in range(8)]
    for number in range(20):
        barrier = threading.Barrier(8)

        def say(place, name=f"{number}", barrier=barrier):
            barrier.wait()
            return owners[place].first_word(name, f"{place}" * 100_000)

        with ThreadPoolExecutor(8) as pool:
            heard = set(pool.map(say, range(8)))
        assert len(heard) == 1 and len(heard.pop()) == 100_000
    assert not list((tmp_path / "claims").glob("*.part"))


def test_a_first_word_is_said_again_when_the_folder_is_cleared(tmp_path):
    claims = Claims(tmp_path / "claims")
    stop = threading.Event()

    def clear():
        while not stop.is_set():
            claims.clear(["word"])

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        assert all(0 <= int(claims.first_word("word", f"{number}")) <= number for number in range(200))
    finally:
        stop.set()
        thread.join()


def test_claims_are_taken_while_another_process_clears_the_folder(tmp_path):
    owner, other = Claims(tmp_path / "claims"), elsewhere(tmp_path / "claims")
    stop = threading.Event()

    def clear():
        while not stop.is_set():
            other.clear([])

    thread = threading.Thread(target=clear)
    thread.start()
    try:
        taken = 0
        for _ in range(2000):
            if owner.take(NAME):
                taken += owner.holds(NAME)
                owner.release(NAME)
    finally:
        stop.set()
        thread.join()
    assert taken > 0


def test_the_folder_is_left_to_who_holds_a_claim_in_it(tmp_path):
    folder = tmp_path / "claims"
    mine, other = Claims(folder), elsewhere(folder)
    mine.first_word("word", "x")
    assert other.take(NAME)
    mine.leave("word")
    assert (folder / "word").exists() and other.holds(NAME)
    other.release(NAME)
    mine.leave("word")
    mine.leave("word")
    assert not folder.exists()


def test_processes_of_a_job_begin_apart():
    def first(**environment):
        return start_position(1000, {name: str(value) for name, value in environment.items()})

    for starts in (
        [first(SLURM_ARRAY_TASK_ID=task) for task in range(8)],
        [first(SLURM_PROCID=rank, SLURM_NTASKS=8) for rank in range(8)],
        [first(RANK=rank, WORLD_SIZE=8) for rank in range(8)],
        [first(SLURM_ARRAY_TASK_ID=n // 2, SLURM_PROCID=n % 2, SLURM_NTASKS=2) for n in range(8)],
    ):
        gaps = [b - a for a, b in zip(sorted(starts), [*sorted(starts)[1:], min(starts) + 1000], strict=True)]
        assert min(gaps) >= 50 and all(0 <= start < 1000 for start in starts)
    assert start_position(3, {}) in (0, 1, 2)


@pytest.mark.parametrize("timeout", [0, -1, float("nan")])
def test_a_timeout_that_is_none(tmp_path, timeout):
    with pytest.raises(ValueError, match="expected seconds above 0"):
        Claims(tmp_path, timeout)
