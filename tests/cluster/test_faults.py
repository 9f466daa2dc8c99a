"""What breaks under a fit on two nodes of a real Slurm: the network, preemption, the end of an epoch that is told to
stop, a node's daemon, a node. `test_road.py` has a stop within an epoch.

One run suffers all faults, one after the other. Each test disturbs it at a step before which both ranks are held, and
ends once it is held before the next such step and has done what an undisturbed run on the same two nodes did there, bit
for bit. The last test lets it finish and compares all that it has left. A test that is chosen alone opens the steps of
those before it. After a fault that the run does not come through, the later ones are skipped.
"""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cluster.lab import Lab
from tests.kills.comparison import compare_runs, compare_steps
from tests.kills.step_trace import count_steps
from tests.kills.tiny_fit import write_recipe
from tests.support.fork_server import ROOT
from trainer.checkpoint.file import checkpoint_fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS, STEPS = 2, 16
#: Before these steps the ranks are held until a test lets them go on: none is a step that is saved at.
HELD = (4, 5, 11, 14, 19, 22, 26)
#: What gloo says when a collective's time has run out: in the call that waited, and in one that comes after it.
GLOO_TIMEOUT = re.compile("Timed out waiting|Application timeout caused pair closure")
#: Seconds for a start, on a machine that has other things to do.
START = 240


class HeldRun:
    """A fit on both nodes whose steps in `held` wait for this test."""

    def __init__(self, lab: Lab, recipe_folder: Path, name: str, *options: str, held: tuple[int, ...] = HELD) -> None:
        self.lab, self.folder, self.gates = lab, recipe_folder / "runs" / name, recipe_folder / f"gates-{name}"
        #: The test whose fault the run has not come through yet.
        self.fault: str | None = None
        self._taken_again = 0
        self.gates.mkdir()
        recipe = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
        recipe["run"] |= {"name": name, "watchdog_s": 0}
        gate = {
            "class_path": "tests.support.rank_faults.Gate",
            "init_args": {"folder": str(self.gates), "steps": list(held)},
        }
        recipe["trainer"]["callbacks"].append(gate)
        (recipe_folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        lab.reblock(
            "submit", "--config", recipe_folder / f"{name}.yaml", "--nodes", "2", "--time", "1:00:00",
            "--env", f"{{PYTHONPATH: {ROOT}}}", *options, cwd=recipe_folder,
        )  # fmt: skip
        lines = (self.folder / "job" / "jobs.jsonl").read_text().splitlines()
        self.job = yaml.safe_load(lines[-1])["job"]

    def waits(self, step: int) -> None:
        """Returns once both ranks are held before a step; those before it are opened."""
        self.open(*(before for before in HELD if before < step))
        marks = [self.gates / f"waits-{step}-{rank}" for rank in range(2)]
        self.lab.until(lambda: all(mark.exists() for mark in marks), f"step {step}", timeout=START, says=self.says)

    def open(self, *steps: int) -> None:
        for step in steps:
            (self.gates / f"open-{step}").touch()

    def comes_through(self, step: int, undisturbed: Path, *, again: bool) -> None:
        """Returns once the run is held before the next step after `step`, at which a fault befell it; what it has done
        is the same, and whether it has taken steps again since the fault before is as it should be."""
        following = HELD[HELD.index(step) + 1]
        self.waits(following)
        found = compare_steps(undisturbed, self.folder, 2)
        assert not found.different, (found.different, self.says())
        assert found.lost == [(rank, left) for rank in range(2) for left in range(following, STEPS * EPOCHS)]
        taken_again, self._taken_again = found.repeated - self._taken_again, found.repeated
        assert (taken_again > 0) == again, (taken_again, self.says())
        self.fault = None

    def requeues(self) -> int:
        """How often Slurm has queued the job again: the number of its present start, counted from 0."""
        return int(self.lab.job(self.job)["Restarts"])

    def requeued(self, before: int) -> None:
        """Returns once Slurm has queued the job again once more than `before`."""
        self.lab.until(lambda: self.requeues() > before, f"requeue {before + 1}", timeout=START, says=self.says)
        assert self.requeues() == before + 1

    def end(self) -> None:
        self.open(*HELD)
        self.lab.wait(self.job, "COMPLETED", timeout=START)

    def says(self) -> str:
        logs = sorted((self.folder / "logs").glob("*.log"))
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in logs)

    def hears(self, number: signal.Signals) -> None:
        """Returns once the signal has come to a process of each node, which holds it back."""
        self.lab.until(
            lambda: self.lab.pending(number, "reblock", "fit"), f"{number.name} on both nodes", says=self.says
        )

    def start_log(self, start: int, rank: int = 0) -> str:
        return (self.folder / "logs" / f"{self.folder.name}-{self.job}-r{start}-{rank}.log").read_text()

    def ranks(self, node: str) -> list[int]:
        """Processes of the fit on a node, loader processes too."""
        return self.lab.processes(node, "reblock", "fit")


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    path = write_recipe(folder, epochs=EPOCHS, ranks=1)
    recipe = yaml.safe_load(path.read_text())
    recipe["trainer"] |= {"devices": 1, "strategy": "ddp"}
    path.write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture(scope="module")
def undisturbed(_session_lab, recipe_folder) -> Path:
    """The run that nothing disturbs."""
    run = HeldRun(_session_lab, recipe_folder, "undisturbed", held=())
    run.end()
    return run.folder


@pytest.fixture(scope="module")
def disturbed(_session_lab, recipe_folder, undisturbed) -> Iterator[HeldRun]:
    """The run of all tests. What they break is mended after the last."""
    try:
        yield HeldRun(
            _session_lab, recipe_folder, "disturbed", "--partition", "graceful", "--run.collective_timeout_s", "10"
        )
    finally:
        _session_lab.heal()


@pytest.fixture
def run(disturbed, request) -> HeldRun:
    """`disturbed`, which has come through all that befell it until now."""
    if disturbed.fault:
        pytest.skip(f"the run has not come through {disturbed.fault}")
    disturbed.fault = request.node.name
    return disturbed


def until_gone(lab: Lab, processes: list[int], what: str, timeout: float = 120) -> None:
    assert processes
    lab.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in processes), what, timeout=timeout)


def test_the_network_is_cut_for_good(run, undisturbed):
    """A node's cable is pulled: a collective's time runs out on both ranks, and Slurm gives the node up."""
    lab, start = run.lab, run.requeues()
    run.waits(4)
    left = run.ranks("node2")
    lab.cut("node2")
    run.open(4)
    for rank in range(2):
        lab.until(
            lambda rank=rank: GLOO_TIMEOUT.search(run.start_log(start, rank)), f"rank {rank}'s error", says=run.says
        )
    until_gone(lab, left, "the end of the rank beyond the cut")
    run.requeued(start)
    # Later starts have time enough for a cut that is mended, and for a rank that comes to its start late.
    settings = run.folder / "job" / "config.yaml"
    recipe = yaml.safe_load(settings.read_text())
    recipe["run"]["collective_timeout_s"] = None
    settings.write_text(yaml.safe_dump(recipe, sort_keys=False))
    lab.mend("node2")
    run.comes_through(4, undisturbed, again=True)


def test_the_network_is_cut_for_a_while(run, undisturbed):
    """Packets are lost, nothing is closed: the ranks wait, and go on as if nothing had been."""
    lab, start = run.lab, run.requeues()
    run.waits(5)
    before = [count_steps(run.folder, rank) for rank in range(2)]
    lab.cut("node1", "node2")
    run.open(5)
    lab.until(lambda: lab.sends_again("node1") > 4, "packets that are sent again and again")
    assert [count_steps(run.folder, rank) for rank in range(2)] == before
    lab.mend("node1", "node2")
    run.comes_through(5, undisturbed, again=False)
    assert run.requeues() == start


def test_a_preemption_that_leaves_time_to_end(run, undisturbed):
    lab, start = run.lab, run.requeues()
    run.waits(11)
    urgent = lab.submit("#!/bin/bash\n#SBATCH --nodes=2 --exclusive --partition=debug\ntrue\n")
    run.hears(signal.SIGTERM)
    run.open(11)
    lab.wait(urgent, "COMPLETED")
    run.requeued(start)
    assert "stopped by SIGTERM after step 13, exit status 143" in run.start_log(start)
    run.comes_through(11, undisturbed, again=False)


def test_the_stop_signal_at_the_end_of_an_epoch(run, undisturbed):
    """Nothing is saved there: one step is taken again."""
    lab, start = run.lab, run.requeues()
    run.waits(14)
    lab.run("scancel", "--signal=USR1", run.job)
    run.hears(signal.SIGUSR1)
    run.open(14)
    run.requeued(start)
    assert f"after step {STEPS}, exit status 75" in run.start_log(start)
    run.comes_through(14, undisturbed, again=True)


def test_a_nodes_daemon_dies(run, undisturbed):
    """Slurm gives the node up and queues the job again; the rank that was left there ends before the job goes on."""
    lab, start = run.lab, run.requeues()
    run.waits(19)
    left = run.ranks("node2")
    lab.kill_slurmd("node2")
    run.requeued(start)
    lab.start_slurmd("node2")
    until_gone(lab, left, "the end of the rank that was left there")
    lab.wait(run.job, "RUNNING", timeout=START)
    run.comes_through(19, undisturbed, again=True)


def test_a_node_dies(run, undisturbed):
    lab, start = run.lab, run.requeues()
    run.waits(22)
    gone = run.ranks("node2")
    lab.kill_node("node2")
    until_gone(lab, gone, "the end of the node's processes", timeout=20)
    run.requeued(start)
    lab.start_nodes()
    run.comes_through(22, undisturbed, again=True)


def test_in_the_end_it_has_done_and_left_what_the_undisturbed_run_has(run, undisturbed):
    """But for its logs, and for steps that were taken again."""
    run.waits(HELD[-1])
    run.end()
    found = compare_runs(undisturbed, run.folder, 2)
    found.files = [name for name in found.files if not name.startswith("logs/")]
    assert not found.faults(), (found.faults(), run.says())
    assert not any(checkpoint_fault(path) for path in (run.folder / "checkpoints").glob("*.ckpt"))
    run.lab.until(lambda: not [*run.ranks("node1"), *run.ranks("node2")], "all processes to be gone")
