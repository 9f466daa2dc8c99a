"""Two ranks over gloo, killed with SIGKILL at the worst moments: nothing hangs, is left over, or differs."""

import shutil
from pathlib import Path

import pytest
import yaml

from data.files import temporaries
from tests.kills.comparison import Comparison, compare_runs
from tests.kills.step_trace import read_traces
from tests.kills.tiny_fit import STEPS, fit_arguments, write_recipe
from tests.support.ranks import Ranks, reblock, wait_for
from trainer.checkpoint.file import checkpoint_fault

pytestmark = pytest.mark.slow

EPOCHS = 2
#: Seconds until every process must be gone by itself; a start on a busy machine may take a minute.
DEADLINE = 240


@pytest.fixture(scope="module")
def killable(tmp_path_factory) -> Path:
    """A recipe with `Killer` in it, beside its shards."""
    path = write_recipe(tmp_path_factory.mktemp("killable"), epochs=EPOCHS, ranks=2)
    recipe = yaml.safe_load(path.read_text())
    recipe["trainer"]["callbacks"].append({"class_path": "tests.support.rank_faults.Killer"})
    path.write_text(yaml.safe_dump(recipe))
    return path


def start(
    recipe: Path, name: str, *more: str, ranks: int = 2, kill: str = "never:-1:0", epochs: int = EPOCHS, **how
) -> Ranks:
    options = ["--trainer.devices", str(ranks), "--trainer.max_epochs", str(epochs)]
    return reblock(
        recipe.parent / "logs" / name, *fit_arguments(recipe, name), *options, *more, ranks=ranks,
        environment={"REBLOCK_TEST_KILL": kill}, **how,
    )  # fmt: skip


def finish(job: Ranks) -> None:
    with job:
        assert set(job.statuses(DEADLINE * 2)) == {0}, job.output()


@pytest.fixture(scope="module")
def undisturbed(killable) -> Path:
    """The run that nobody disturbs."""
    finish(start(killable, "undisturbed"))
    run = killable.parent / "runs" / "undisturbed"
    stages = [f"epoch-{epoch:03d}" for epoch in range(EPOCHS + 1)]
    assert {path.stem for path in (run / "figures").iterdir()} >= {f"sinks-{stage}" for stage in stages}
    return run


def killed(job: Ranks, victims: list[int]) -> None:
    """The victims have died by SIGKILL, the others by themselves and with an error; helpers are gone too."""
    with job:
        status = job.statuses(DEADLINE)
        assert [rank for rank, code in enumerate(status) if code == -9] == victims, job.output()
        assert 0 not in status, job.output()
        wait_for(lambda: not job.left_over(), DEADLINE, f"helpers to end: {job.left_over()}")


def whole_files(run: Path) -> set[str]:
    """Checkpoints, none of which is damaged."""
    found = {path.name: checkpoint_fault(path) for path in (run / "checkpoints").glob("*.ckpt")}
    assert not any(found.values()), found
    return set(found)


def test_a_rank_killed_at_any_moment_costs_nothing_but_time(killable, undisturbed):
    """One run, killed in an all-reduce, a checkpoint's write, a measurement, and altogether in a step."""
    run = killable.parent / "runs" / "killed"
    killed(start(killable, "killed", kill="all-reduce:1:5"), [1])
    assert whole_files(run) == {"last.ckpt"}
    killed(start(killable, "killed", kill="write:0:9"), [0])
    assert whole_files(run) >= {"last.ckpt", "previous.ckpt"}
    assert temporaries(run / "checkpoints", "last.ckpt")  # half of it
    killed(start(killable, "killed", kill="measurement:1:16"), [1])
    assert whole_files(run) >= {"last.ckpt", "previous.ckpt"}
    killed(start(killable, "killed", kill="all-reduce:0:22"), [0])
    killed(start(killable, "killed", kill="step:*:28"), [0, 1])
    finish(start(killable, "killed"))
    found = compare_runs(undisturbed, run, 2)
    assert not found.faults() and found.repeated > 0
    assert found.steps == 2 * EPOCHS * STEPS + found.repeated


def joined(run: Path, ranks: int) -> dict[int, dict]:
    """Step -> its global batch: samples in the order of ranks; a step taken again counts as it was last."""
    parts = [{line["step"]: line for line in lines} for lines in read_traces(run, ranks)]

    def global_batch(step: int) -> dict:
        keys = ("uids", "sigma", "noise", "losses")
        return {key: [value for part in parts if step in part for value in part[step][key]] for key in keys}

    return {step: global_batch(step) for step in parts[0]}


def test_on_another_number_of_ranks_the_batches_are_the_same(killable, undisturbed):
    """Killed on two ranks, resumed by one, killed there, and ended by two."""
    runs, expected = killable.parent / "runs", joined(undisturbed, 2)
    taken: dict[int, dict] = {}
    for number, (ranks, kill) in enumerate([(2, "step:1:11"), (1, "step:0:25"), (2, "never:-1:0")]):
        job = start(killable, "elastic", ranks=ranks, kill=kill)
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
    assert whole_files(runs / "elastic") == whole_files(undisturbed)


def test_rank_zero_says_which_checkpoint_whatever_others_see(killable, undisturbed):
    """A rank that finds an old checkpoint, as in a shared folder that lags behind, waits for rank zero's."""
    home, elsewhere = killable.parent, killable.parent / "elsewhere"
    shutil.copytree(undisturbed, home / "runs" / "lagging", ignore=shutil.ignore_patterns("trace"))  # keeps times
    lagging = elsewhere / "runs" / "lagging" / "checkpoints"
    lagging.mkdir(parents=True)
    shutil.copy(undisturbed / "checkpoints" / "previous.ckpt", lagging / "last.ckpt")
    homes = {0: home, 1: elsewhere}
    job = start(killable, "lagging", "--run.root", "runs", epochs=EPOCHS + 1, homes=homes)
    try:
        wait_for(lambda: "is not here yet as rank zero sees it" in job.logs[1].read_text(), DEADLINE, "rank 1 to wait")
        shutil.copy2(undisturbed / "checkpoints" / "last.ckpt", lagging / "arrives")
        (lagging / "arrives").rename(lagging / "last.ckpt")
    finally:
        finish(job)
    expected = list(range(EPOCHS * STEPS, (EPOCHS + 1) * STEPS))
    for rank, place in homes.items():
        trace = read_traces(place / "runs" / "lagging", 2)[rank]
        assert [line["step"] for line in trace] == expected


def test_comparing_finds_a_difference(undisturbed, tmp_path):
    """The yardstick itself: a sample, a step, a row or a file that differs is seen."""
    assert compare_runs(undisturbed, undisturbed, 2) == Comparison(steps=2 * EPOCHS * STEPS)
    other = tmp_path / "other"
    shutil.copytree(undisturbed, other)
    trace, table = other / "trace" / "rank1.jsonl", other / "metrics.csv"
    lines = trace.read_text().splitlines()
    lines[3] = lines[3].replace('"uids": [', '"uids": [999, ')
    trace.write_text("\n".join([*lines[:7], *lines[8:]]) + "\n")
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    (other / "metrics.csv.tmp").touch()
    found = compare_runs(undisturbed, other, 2)
    assert found.different == [(1, 3)] and found.lost == [(1, 7)] and found.rows == 1
    assert found.files == ["metrics.csv.tmp"] and len(found.faults()) == 4
