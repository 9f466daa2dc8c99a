"""Two ranks over gloo, killed with SIGKILL at the worst moments: nothing hangs, is left over, or differs."""

import shutil
from pathlib import Path

import pytest
import yaml

from data.files import temporaries
from launch.bench.compare import Comparison, compare
from launch.bench.kills import arguments, make_world
from launch.bench.ranks import Ranks, wait_for
from launch.bench.trace import read_trace
from trainer.checkpoint.file import checkpoint_fault

pytestmark = pytest.mark.slow

EPOCHS, STEPS = 3, 16
#: Seconds until every process must be gone by itself; a start on a busy machine may take a minute.
DEADLINE = 240


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A recipe with `Killer` in it, beside its shards."""
    folder = tmp_path_factory.mktemp("world")
    path = make_world(folder, epochs=EPOCHS, ranks=2)
    recipe = yaml.safe_load(path.read_text())
    recipe["trainer"]["callbacks"].append({"class_path": "tests.support.rank_faults.Killer"})
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(
    recipe: Path, name: str, *more: str, ranks: int = 2, kill: str = "never:-1:0", epochs: int = EPOCHS, **how
) -> Ranks:
    options = ["--trainer.devices", str(ranks), "--trainer.max_epochs", str(epochs)]
    return Ranks(
        [*arguments(recipe, name), *options, *more], ranks=ranks, logs=recipe.parent / "logs" / name,
        environment={"REBLOCK_TEST_KILL": kill}, **how,
    )  # fmt: skip


def finish(job: Ranks) -> None:
    with job:
        assert job.wait(DEADLINE * 2) == [0] * len(job.processes), job.output()


@pytest.fixture(scope="module")
def whole(world) -> Path:
    """The run that nobody disturbs."""
    finish(start(world, "whole"))
    return world.parent / "runs" / "whole"


def killed(job: Ranks, victims: list[int]) -> None:
    """The victims have died by SIGKILL, the others by themselves and with an error; helpers are gone too."""
    with job:
        status = job.wait(DEADLINE)
        assert [rank for rank, code in enumerate(status) if code == -9] == victims, job.output()
        assert 0 not in status, job.output()
        wait_for(lambda: not job.left_over(), DEADLINE, f"helpers to end: {job.left_over()}")


def whole_files(run: Path) -> set[str]:
    """Checkpoints, none of which is damaged."""
    found = {path.name: checkpoint_fault(path) for path in (run / "checkpoints").glob("*.ckpt")}
    assert not any(found.values()), found
    return set(found)


def test_a_rank_killed_at_any_moment_costs_nothing_but_time(world, whole):
    """One run, killed in an all-reduce, a checkpoint's write, a measurement, and altogether in a step."""
    run = world.parent / "runs" / "killed"
    killed(start(world, "killed", kill="all-reduce:1:5"), [1])
    assert whole_files(run) == {"last.ckpt"}
    killed(start(world, "killed", kill="write:0:9"), [0])
    assert whole_files(run) >= {"last.ckpt", "previous.ckpt"}
    assert temporaries(run / "checkpoints", "last.ckpt")  # half of it
    killed(start(world, "killed", kill="measurement:1:16"), [1])
    assert whole_files(run) >= {"last.ckpt", "previous.ckpt"}
    killed(start(world, "killed", kill="all-reduce:0:25"), [0])
    killed(start(world, "killed", kill="step:*:33"), [0, 1])
    finish(start(world, "killed"))
    found = compare(whole, run, 2)
    assert not found.faults() and found.again > 0
    assert found.steps == 2 * EPOCHS * STEPS + found.again


def joined(run: Path, ranks: int) -> dict[int, dict]:
    """Step -> its global batch: samples in the order of ranks; a step taken again counts as it was last."""
    parts = [{line["step"]: line for line in lines} for lines in read_trace(run, ranks)]

    def global_batch(step: int) -> dict:
        keys = ("uids", "sigma", "noise", "losses")
        return {key: [value for part in parts if step in part for value in part[step][key]] for key in keys}

    return {step: global_batch(step) for step in parts[0]}


def test_on_another_number_of_ranks_the_batches_are_the_same(world, whole):
    """Killed on two ranks, gone on with by one, killed there, and ended by two."""
    runs, expected = world.parent / "runs", joined(whole, 2)
    taken: dict[int, dict] = {}
    for number, (ranks, kill) in enumerate([(2, "step:1:11"), (1, "step:0:30"), (2, "never:-1:0")]):
        job = start(world, "elastic", ranks=ranks, kill=kill)
        killed(job, [int(kill.split(":")[1])]) if number < 2 else finish(job)
        trace = runs / "elastic" / "trace"
        part = joined(runs / "elastic", ranks)
        assert sorted(part) == list(range(min(part), max(part) + 1))
        assert not taken or min(part) <= max(taken) + 1  # goes on where, or before, the last one stopped
        taken |= part
        shutil.rmtree(trace)
    assert sorted(taken) == list(range(EPOCHS * STEPS))
    for step, batch in expected.items():
        for key in ("uids", "sigma", "noise"):
            assert taken[step][key] == batch[key], (step, key)
        losses = [[float.fromhex(value) for value in found["losses"]] for found in (taken[step], batch)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-4), step
    assert whole_files(runs / "elastic") == whole_files(whole)


def test_rank_zero_says_which_checkpoint_whatever_others_see(world, whole):
    """A rank that finds an old checkpoint, as in a shared folder that lags behind, waits for rank zero's."""
    home, elsewhere = world.parent, world.parent / "elsewhere"
    shutil.copytree(whole, home / "runs" / "lagging", ignore=shutil.ignore_patterns("trace"))  # keeps times
    lagging = elsewhere / "runs" / "lagging" / "checkpoints"
    lagging.mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "previous.ckpt", lagging / "last.ckpt")
    homes = {0: home, 1: elsewhere}
    job = start(world, "lagging", "--run.root", "runs", epochs=EPOCHS + 1, homes=homes)
    try:
        wait_for(lambda: "is not here yet as rank zero sees it" in job.logs[1].read_text(), DEADLINE, "rank 1 to wait")
        shutil.copy2(whole / "checkpoints" / "last.ckpt", lagging / "arrives")
        (lagging / "arrives").rename(lagging / "last.ckpt")
    finally:
        finish(job)
    expected = list(range(EPOCHS * STEPS, (EPOCHS + 1) * STEPS))
    for rank, place in homes.items():
        trace = read_trace(place / "runs" / "lagging", 2)[rank]
        assert [line["step"] for line in trace] == expected


def test_comparing_finds_a_difference(whole, tmp_path):
    """The yardstick itself: a sample, a step, a row or a file that differs is seen."""
    assert compare(whole, whole, 2) == Comparison(steps=2 * EPOCHS * STEPS)
    other = tmp_path / "other"
    shutil.copytree(whole, other)
    trace, table = other / "trace" / "rank1.jsonl", other / "metrics.csv"
    lines = trace.read_text().splitlines()
    lines[3] = lines[3].replace('"uids": [', '"uids": [999, ')
    trace.write_text("\n".join([*lines[:7], *lines[8:]]) + "\n")
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    (other / "metrics.csv.tmp").touch()
    found = compare(whole, other, 2)
    assert found.otherwise == [(1, 3)] and found.lost == [(1, 7)] and found.rows == 1
    assert found.files == ["metrics.csv.tmp"] and len(found.faults()) == 4
