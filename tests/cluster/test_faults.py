"""What breaks under a fit on two nodes of a real Slurm: signals, preemption, a node's daemon, a node, the network.

Each test has one run that is disturbed at a step where both ranks are held, and compares all that it has done and left
with an undisturbed run on the same two nodes, bit for bit.
"""

import re
import signal
import sys
from pathlib import Path

import pytest
import yaml

from tests.kills.comparison import compare_runs
from tests.kills.step_trace import count_steps
from tests.kills.tiny_fit import write_recipe
from trainer.checkpoint.file import checkpoint_fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
REBLOCK = Path(sys.executable).with_name("reblock")
EPOCHS, STEPS = 2, 16
#: Before these steps the ranks are held until the test lets them go on: none is a step that is saved at.
HELD = (4, 8, 14, 22)
#: What gloo says when a collective's time has run out: in the call that waited, and in one that comes after it.
GLOO_TIMEOUT = re.compile("Timed out waiting|Application timeout caused pair closure")
#: Seconds for a start, on a machine that has other things to do.
START = 240


class HeldRun:
    """A fit on both nodes whose steps in `HELD` wait for this test."""

    def __init__(self, lab, recipe_folder: Path, name: str, *options: str, held: tuple[int, ...] = HELD) -> None:
        self.lab, self.folder, self.gates = lab, recipe_folder / "runs" / name, recipe_folder / f"gates-{name}"
        self.gates.mkdir()
        recipe = yaml.safe_load((recipe_folder / "recipe.yaml").read_text())
        recipe["run"] |= {"name": name, "watchdog_s": 0}
        gate = {
            "class_path": "tests.support.rank_faults.Gate",
            "init_args": {"folder": str(self.gates), "steps": list(held)},
        }
        recipe["trainer"]["callbacks"].append(gate)
        (recipe_folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        lab.run(
            REBLOCK, "submit", "--config", recipe_folder / f"{name}.yaml", "--nodes", "2", "--time", "0:30:00",
            "--env", f"{{PYTHONPATH: {ROOT}}}", *options, cwd=recipe_folder, timeout=START, PYTHONPATH=str(ROOT),
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

    def restarted(self, times: int) -> None:
        self.lab.until(lambda: self.facts["Restarts"] == str(times), f"requeue {times}", timeout=START, says=self.says)

    @property
    def facts(self) -> dict[str, str]:
        return self.lab.job(self.job)

    def end(self, state: str = "COMPLETED") -> None:
        self.lab.wait(self.job, state, timeout=START)

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


def assert_same(run: HeldRun, undisturbed: Path, *, again: bool) -> None:
    """Nothing differs from the undisturbed run but its logs, and whether steps were taken again is as it should be."""
    found = compare_runs(undisturbed, run.folder, 2)
    found.files = [name for name in found.files if not name.startswith("logs/")]
    assert not found.faults(), (found.faults(), run.says())
    assert (found.repeated > 0) == again, found
    assert not any(checkpoint_fault(path) for path in (run.folder / "checkpoints").glob("*.ckpt"))
    run.lab.until(lambda: not [*run.ranks("node1"), *run.ranks("node2")], "all processes to be gone")


def test_requeued_three_times_over(lab, recipe_folder, undisturbed):
    """By the stop signal, by a preemption that leaves time to end, and by the stop signal again."""
    run = HeldRun(lab, recipe_folder, "thrice", "--partition", "graceful")
    run.waits(4)
    lab.run("scancel", "--signal=USR1", run.job)
    run.hears(signal.SIGUSR1)
    run.open(4)
    run.restarted(1)
    assert "stopped by the stop signal after step 6, exit status 75" in run.start_log(0)
    run.waits(8)
    urgent = lab.submit("#!/bin/bash\n#SBATCH --nodes=2 --exclusive --partition=debug\ntrue\n")
    run.hears(signal.SIGTERM)
    run.open(8)
    lab.wait(urgent, "COMPLETED")
    run.restarted(2)
    assert "stopped by SIGTERM after step 10, exit status 143" in run.start_log(1)
    run.waits(14)
    lab.run("scancel", "--signal=USR1", run.job)
    run.hears(signal.SIGUSR1)
    run.open(14)
    run.restarted(3)
    assert "after step 16, exit status 75" in run.start_log(2)  # the epoch's last: one step is taken again
    run.open(*HELD)
    run.end()
    assert_same(run, undisturbed, again=True)


def test_a_nodes_daemon_dies_under_a_fit(lab_to_break, recipe_folder, undisturbed):
    """Slurm gives the node up and queues the job again; the rank that was left there ends before the job goes on."""
    lab = lab_to_break
    run = HeldRun(lab, recipe_folder, "daemon")
    run.waits(4)
    left = run.ranks("node2")
    lab.kill_slurmd("node2")
    run.restarted(1)
    lab.start_slurmd("node2")
    lab.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), "the end of the rank that was left")
    lab.wait(run.job, "RUNNING", timeout=START)
    run.open(*HELD)
    run.end()
    assert_same(run, undisturbed, again=True)


def test_a_node_dies_under_a_fit(lab_to_break, recipe_folder, undisturbed):
    lab = lab_to_break
    run = HeldRun(lab, recipe_folder, "node")
    run.waits(14)
    lab.kill_node("node2")
    run.restarted(1)
    lab.start_nodes()
    run.open(*HELD)
    run.end()
    assert_same(run, undisturbed, again=True)


def test_the_network_is_cut_for_a_while(lab_to_break, recipe_folder, undisturbed):
    """Packets are lost, nothing is closed: the ranks wait, and go on as if nothing had been."""
    lab = lab_to_break
    run = HeldRun(lab, recipe_folder, "while")
    run.waits(8)
    lab.cut("node1", "node2")
    run.open(8)
    lab.until(lambda: lab.sends_again("node1") > 4, "packets that are sent again and again")
    assert [count_steps(run.folder, rank) for rank in range(2)] == [8, 8]
    lab.mend("node1", "node2")
    run.open(*HELD)
    run.end()
    assert_same(run, undisturbed, again=False)


def test_the_network_is_cut_for_good(lab_to_break, recipe_folder, undisturbed):
    """A node's cable is pulled: a collective's time runs out on both ranks, and Slurm gives the node up."""
    lab = lab_to_break
    run = HeldRun(lab, recipe_folder, "good", "--run.collective_timeout_s", "10")
    run.waits(8)
    left = run.ranks("node2")
    lab.cut("node2")
    run.open(8)
    for rank in range(2):
        lab.until(lambda rank=rank: GLOO_TIMEOUT.search(run.start_log(0, rank)), f"rank {rank}'s error", says=run.says)
    lab.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), "the end of the rank beyond the cut")
    run.restarted(1)
    lab.mend("node2")
    run.open(*HELD)
    run.end()
    assert_same(run, undisturbed, again=True)
