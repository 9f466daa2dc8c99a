"""`reblock submit` on a real Slurm: what is refused, what a script asks for, requeues, chains of stages.

The fits here are stand-ins of a few lines of shell (`--command`), so that only the script and Slurm are at work;
`test_road.py` has the real ones.
"""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launch.cluster.batch_script import directive, file_pattern
from tests.support.fork_server import ROOT
from tests.support.latent_shards import write_latents

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

#: Notes its call; what it does then is the test's, in `act.sh` beside it.
STAND_IN = """#!/bin/bash
here=$(dirname "$0")
echo "$1 job=$SLURM_JOB_ID start=${SLURM_RESTART_COUNT:-0} rank=$SLURM_PROCID host=$(hostname)" >> "$here/calls"
. "$here/act.sh"
"""


@pytest.fixture
def folder(tmp_path, tiny_config) -> Path:
    """A recipe for two ranks, latents and a base."""
    (tmp_path / "base.json").write_text(json.dumps(tiny_config))
    write_latents(tmp_path / "latents", [("7x32x32", 40)], channels=4, width=16)
    recipe = {
        "run": {"name": "tiny", "root": "runs", "wandb": False},
        "trainer": {"accelerator": "cpu", "devices": 1, "strategy": "ddp", "max_epochs": 1},
        "model": {
            "class_path": "trainer.module.RetrainBlocks",
            "init_args": {"base": "base.json", "surgery": {"last": 2}},
        },
        "data": {
            "class_path": "data.modules.latents.LatentDataModule",
            "init_args": {"shards": "latents", "val_samples": 8, "global_batch_size": 4},
        },
        "nodes": 2,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.fixture
def submit(lab, folder):
    """(what the stand-in does, *options, name of the run) -> the jobs' ids, by stage."""

    def run(act: str, *options: str, name: str = "tiny") -> dict[str, str]:
        command = folder / f"act-{name}" / "stand-in"
        command.parent.mkdir()
        command.write_text(STAND_IN)
        command.chmod(0o755)
        command.with_name("act.sh").write_text(act)
        words = ("--config", "recipe.yaml", "--command", command, "--run.name", name)
        lab.reblock("submit", *words, *options, cwd=folder)
        lines = (folder / "runs" / name / "job" / "jobs.jsonl").read_text().splitlines()
        return {entry["stage"]: entry["job"] for entry in map(json.loads, lines)}

    return run


def calls(folder: Path, name: str = "tiny") -> list[str]:
    """Calls of the stand-in of a run, as they came."""
    return (folder / f"act-{name}" / "calls").read_text().splitlines()


def refused(lab, folder, *options: str) -> str:
    done = lab.reblock("submit", "--config", "recipe.yaml", *options, cwd=folder, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr


def test_what_the_cluster_cannot_give_is_refused_before_anything_is_written(lab, folder):
    said = refused(lab, folder, "--partition", "fast", "--container_image", "x")
    assert (
        "got partition fast, expected one of: debug, graceful, graceless" in said
        and "has no --container-image (pyxis)" in said
    )
    said = refused(lab, folder, "--nodes", "3", "--cpus_per_task", "9", "--trainer.accelerator", "gpu",
                   "--gpus_per_node", "3", "--data.global_batch_size", "9")  # fmt: skip
    assert "partition debug cannot give what is asked: 3 nodes of 2; 3 tasks x 9 CPUs on a node of 4; 3 GPUs" in said
    assert not (folder / "runs").exists() and not lab.run("squeue", "-h").stdout


def test_a_job_that_slurm_refuses_takes_the_ones_before_it_along(lab, folder):
    said = refused(lab, folder, "--stages", "fit,export", "--export.slurm", "[--constraint=none-such]")
    assert "Slurm refused" in said and "export.sbatch" in said and "were taken back" in said
    lab.until(lambda: not lab.run("squeue", "-h").stdout, "an empty queue")


def test_what_a_job_asks_for_and_leaves(lab, folder, submit):
    held = lab.submit("#!/bin/bash\n#SBATCH --hold\ntrue\n")
    job = submit("exit 0", "--time", "0:30:00", "--cpus_per_task", "2", "--after", str(held))["fit"]
    facts = lab.job(job)
    assert facts["JobState"] == "PENDING" and facts["Reason"] == "Dependency"
    assert facts["NumNodes"].startswith("2") and facts["CPUs/Task"] == "2" and facts["TimeLimit"] == "00:30:00"
    assert facts["Requeue"] == "1" and facts["WorkDir"] == str(folder)
    lab.run("scontrol", "release", str(held))
    lab.wait(job, "COMPLETED")
    assert sorted(calls(folder)) == [f"fit job={job} start=0 rank={n} host=node{n + 1}" for n in range(2)]
    run = folder / "runs" / "tiny"
    assert {path.name for path in (run / "logs").iterdir()} == {
        f"tiny-{job}.log", f"tiny-{job}-r0-0.log", f"tiny-{job}-r0-1.log",
    }  # fmt: skip
    assert "start 1 (0 requeued) on 2 node(s), 2 task(s): node[1-2]" in lab.output(job)
    saved = yaml.safe_load((run / "job" / "config.yaml").read_text())
    assert saved["trainer"]["num_nodes"] == 2 and saved["trainer"]["devices"] == 1 and "nodes" not in saved
    assert json.loads((run / "job" / "versions.json").read_text())["packages"]["torch"]
    # By hand, from anywhere, on one node instead of two.
    again = lab.submit(run / "job.sbatch", "--nodes=1", cwd=Path("/"))
    lab.wait(again, "COMPLETED")
    assert calls(folder)[2:] == [f"fit job={again} start=0 rank=0 host=node1"]


def test_status_75_is_a_requeue_and_whoever_waits_goes_on_waiting(lab, folder, submit):
    """Runs of their own, at the same time:

    - a fit whose rank 1 leaves seconds after rank 0: the status is 75 all the same, and its last words are kept;
    - a fit and an array of encode that are told that their time will be up.
    """
    act = """
    [ "$1" = export ] && exit 0
    echo "words of start ${SLURM_RESTART_COUNT:-0}"
    [ "${SLURM_RESTART_COUNT:-0}" -lt 2 ] || exit 0
    [ "$SLURM_PROCID" = 0 ] || { sleep 3; echo "saved"; }
    exit 75
    """
    until_told = """
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
    trap 'echo told; exit 75' USR1
    for i in $(seq 3000); do sleep 0.1; done
    exit 1
    """
    times = ("--time=0:01:10", "--signal_seconds=60")
    base = ROOT / "recipes" / "demo_base"
    jobs = submit(act, "--stages=fit,export")
    timed = submit(until_told, *times, name="timed")["fit"]
    encode = submit(until_told, "--stages=encode", f"--encode.shards={make_video_shards(folder)}", "--encode.tasks=2",
                    "--data.shards=made", f"--model.base={base}", *times, name="array")["encode"]  # fmt: skip

    lab.wait(jobs["export"], "COMPLETED", timeout=240)
    assert lab.job(jobs["fit"])["Restarts"] == "2" and lab.state(jobs["fit"]) == "COMPLETED"
    logs = folder / "runs" / "tiny" / "logs"
    for start in (0, 1):
        assert (logs / f"tiny-{jobs['fit']}-r{start}-1.log").read_text() == f"words of start {start}\nsaved\n"
    assert lab.output(jobs["fit"]).count("asks Slurm to queue the job again") == 2
    assert [line.split()[0] for line in calls(folder)] == ["fit"] * 6 + ["export"]
    shown = lab.reblock("status", folder / "runs" / "tiny").stdout
    assert f"fit {jobs['fit']}, COMPLETED" in shown and "requeued 2 times" in shown
    assert f"export {jobs['export']}, COMPLETED" in shown

    lab.wait(timed, "COMPLETED", timeout=250)
    assert "told" in (folder / "runs" / "timed" / "logs" / f"timed-{timed}-r0-0.log").read_text()
    assert lab.job(timed)["Restarts"] == "1"
    for task in range(2):
        lab.wait(f"{encode}_{task}", "COMPLETED", timeout=250)
        said = (folder / "runs" / "array" / "logs" / f"array-encode-{encode}_{task}.log").read_text()
        assert "stopped by a signal, all is saved" in said and "start 2 (1 requeued)" in said, said


def test_a_failure_is_a_failure_and_what_waits_for_it_is_cancelled(lab, folder, submit):
    jobs = submit('echo "error: no such thing" >&2; exit 3', "--stages=fit,export")
    lab.wait(jobs["fit"], "FAILED")
    assert lab.job(jobs["fit"])["ExitCode"] == "3:0"
    lab.wait(jobs["export"], "CANCELLED")
    shown = lab.reblock("status", folder / "runs" / "tiny").stdout
    assert f"fit {jobs['fit']}, FAILED" in shown and "exit code 3" in shown and "error: no such thing" in shown


def test_a_preempted_job_comes_again_and_a_cancelled_one_does_not(lab, folder, submit):
    """Where Slurm gives it time to end, it does not queue it again by itself once it has ended in time."""
    act = """
    [ "${SLURM_RESTART_COUNT:-0}" = 0 ] || exit 0
    trap 'exit 143' TERM
    echo ready
    for i in $(seq 3000); do sleep 0.1; done
    """
    partitions = ("graceful", "graceless")
    fits = [submit(act, "--partition", partition, name=partition)["fit"] for partition in partitions]

    def ready() -> bool:
        return sum("ready" in path.read_text() for path in folder.glob("runs/grace*/logs/*-r0-?.log")) == 4

    lab.until(ready, "both tasks of both", says=lambda: "\n".join(map(lab.output, fits)))
    urgent = lab.submit("#!/bin/bash\n#SBATCH --nodes=2 --exclusive --partition=debug\ntrue\n")
    lab.wait(urgent, "COMPLETED")
    for fit in fits:
        lab.wait(fit, "COMPLETED")
        assert lab.job(fit)["Restarts"] == "1"
    cancelled = [submit(act, "--partition", partition, name=f"not-{partition}")["fit"] for partition in partitions]
    for fit in cancelled:
        lab.wait(fit, "RUNNING")
        lab.run("scancel", fit)
    for fit in cancelled:
        lab.wait(fit, "CANCELLED")
        assert lab.job(fit)["Restarts"] == "0"


def make_video_shards(folder: Path) -> Path:
    from data.pack.command import pack
    from data.synth.command import synth

    synth(folder / "clips", clips=4)
    pack(str(folder / "clips"), folder / "video", shard_samples=2)
    return folder / "video"


NAMES = st.text(st.characters(min_codepoint=32, blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=16)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES.filter(lambda name: name.strip() == name and "/" not in name))
def test_sbatch_reads_a_directive_as_it_was_meant(lab, tmp_path, name):
    path = f"{tmp_path}/{name}"
    lines = [directive(("job-name", name)), directive(("output", file_pattern(path) + "/%x.log")),
             directive(("comment", f"{name} {name}")), "#SBATCH --hold"]  # fmt: skip
    job = lab.submit("\n".join(["#!/bin/bash", *lines, "true", ""]))
    shown = lab.run("squeue", "-h", "-j", str(job), "-o", "%j%k").stdout
    lab.run("scancel", str(job))
    assert shown == f"{name}{name} {name}\n"
