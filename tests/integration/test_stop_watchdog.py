"""A rank that hangs, and one that dies: nobody waits for ever, and the stacks say where each stood."""

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ranks import ROOT, Ranks

pytestmark = pytest.mark.slow
#: Of the watchdog, seconds; the first step may take four times as long.
WATCHDOG = 5.0


def start(
    folder: Path, shards: Path, *, steps=10**6, watchdog=WATCHDOG, timeout=600.0, fault="nothing", **how
) -> Ranks:
    # The timer that works without the interpreter's lock would end rank 1 while rank 0 still counts.
    deadlines = (watchdog, watchdog + 7 if fault == "lock" else watchdog)
    arguments = [[shards, folder / "run", steps, deadline, timeout, fault] for deadline in deadlines]
    script = ROOT / "tests" / "support" / "stepping_fits.py"
    return Ranks(folder, *[[script, *map(str, own)] for own in arguments], **how)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, shards) -> Iterator[dict[str, tuple[Path, Ranks]]]:
    """Fault -> folder and ranks of a fit in which rank 1 has it. Both fits wait at the same time."""
    with contextlib.ExitStack() as ends:
        found = {}
        for fault in ("sleep", "lock"):
            folder = tmp_path_factory.mktemp(fault)
            found[fault] = folder, ends.enter_context(start(folder, shards, fault=fault))
        yield found


def test_a_rank_that_hangs_ends_all_and_leaves_every_stack(faulty):
    folder, ranks = faulty["sleep"]
    assert ranks.statuses() == [70, 70], ranks.output()
    stacks = [(folder / "run" / "stacks" / f"rank-{rank}.txt").read_text() for rank in range(2)]
    for rank, stack in enumerate(stacks):
        assert f"rank {rank} of 2 on" in stack and "has finished nothing for" in stack
        assert "last: training batch 4 of epoch 0 (run.watchdog_s 5)" in stack
        assert stack.splitlines()[0] in ranks.logs[rank].read_text()
    # Where each stood: rank 1 in its fault, rank 0 waiting for it.
    assert "on_train_batch_start" in stacks[1] and "stepping_fits.py" in stacks[1]
    assert "on_train_batch_start" not in stacks[0]


def test_a_rank_that_keeps_the_interpreters_lock_is_ended_too(faulty):
    _, ranks = faulty["lock"]
    zero, one = ranks.statuses()
    assert (zero, one) == (70, 1), ranks.output()
    assert "on_train_batch_start" in ranks.logs[1].read_text()


def test_a_rank_that_works_is_left_alone(tmp_path, shards):
    # Seven seconds of steps: longer than the deadline.
    with start(tmp_path, shards, steps=70) as ranks:
        assert ranks.statuses() == [0, 0], ranks.output()
    assert not (tmp_path / "run" / "stacks").exists()


def test_a_rank_that_dies_ends_the_other_soon(tmp_path, shards):
    with start(tmp_path, shards, watchdog=600.0) as ranks:
        ranks.until(lambda: "step 3" in ranks.logs[1].read_text())
        ranks.send(signal.SIGKILL, 1)
        died = time.monotonic()
        zero, one = ranks.statuses()
    assert one == -signal.SIGKILL and zero not in (0, 70, 75), ranks.output()
    assert time.monotonic() - died < 60  # neither the watchdog's time nor that of a collective
    assert "finished" not in ranks.output()
