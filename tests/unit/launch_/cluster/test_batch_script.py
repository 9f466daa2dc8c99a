"""The batch script in bash, with stand-ins for srun and scontrol that note how they were called: nothing that comes
from a user is ever more than a word, and the script's status is srun's."""

import os
import string
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from launch.cluster.batch_script import directive, quote_directive, render
from launch.cluster.job_folder import note_job, noted_jobs
from launch.cluster.options import EncodeStage, ExportStage, JobConfig, has_control
from launch.cluster.stage_scripts import Submission, make_scripts
from launch.run_folder import RunFolder

NOTE = """#!/bin/bash
printf '%s\\0' "$(basename "$0")" "$@" >> "$NOTES"
printf '\\n\\0' >> "$NOTES"
[ "$(basename "$0")" != srun ] || exit "${SRUN_STATUS:-0}"
[ "$1" != show ] || echo "JobId=7 PreemptEligibleTime=2026-11-26 PreemptTime=${PREEMPTED:-None} SuspendTime=None"
"""


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """(script, **environment) -> (status, [[command, word, ...], ...], what the script printed)."""
    home = tmp_path_factory.mktemp("shell")
    tools = home / "tools"
    tools.mkdir()
    for name in ("srun", "scontrol", "module"):
        (tools / name).write_text(NOTE)
        (tools / name).chmod(0o755)

    def run(script: str, **environment: str):
        notes, canary = home / "notes", home / "work" / "canary"
        notes.unlink(missing_ok=True)
        canary.parent.mkdir(exist_ok=True)
        known = {"PATH": f"{tools}:{os.environ['PATH']}", "NOTES": str(notes), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2",
                 "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NODELIST": "n[1-2]",
                 "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "4"}  # fmt: skip
        done = subprocess.run(
            ["bash"], input=script.encode("utf-8", "surrogateescape"), env=known | environment, cwd=canary.parent,
            capture_output=True, timeout=60,
        )  # fmt: skip
        assert not any(canary.parent.iterdir()), "the script made a file"
        words = notes.read_text().split("\0") if notes.exists() else []
        calls: list[list[str]] = [[]]
        for word in words[:-1]:
            calls.append([]) if word == "\n" else calls[-1].append(word)
        return done.returncode, [call for call in calls if call], done.stdout.decode() + done.stderr.decode()

    return run


def submission(
    job: JobConfig | None = None, *, name="tiny", here="/home/a", base="b", shards="s", **more
) -> Submission:
    recipe = {"data": {"init_args": {"shards": shards}}, "model": {"init_args": {"base": base}}}
    return Submission(
        options=job or JobConfig(), recipe=recipe, run=RunFolder(Path(here) / "runs" / name), here=Path(here), nodes=2,
        devices=1, **{"gpus": None, "versions": "python 3", "written": "today"} | more,
    )  # fmt: skip


def script(job: JobConfig | None = None, stage: str = "fit", **more) -> str:
    return next(render(made) for made in make_scripts(submission(job, **more)) if made.stage == stage)


#: What breaks quoting, and whole attacks, each of which would leave a file.
HOSTILE = st.one_of(
    st.sampled_from(["$(touch canary)", "`touch canary`", "'; touch canary; '", '"; touch canary; "', "&& touch canary",
                     "> canary", "a b", "-rf", "#x", "a\\", "é ü 中", "%j", "%%", "{{ job }}", "{% x %}", "!x",
                     "~", "*"]),
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1, max_size=20),
    st.text(string.punctuation + " a", min_size=1, max_size=12),
)  # fmt: skip
FOLDER = HOSTILE.filter(lambda name: "/" not in name and name not in (".", "..") and not has_control(name))
WORD = HOSTILE.filter(lambda word: not has_control(word))
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EXAMPLES
@given(name=FOLDER, here=FOLDER, value=WORD, module=WORD, image=WORD, partition=WORD)
def test_a_users_words_stay_words(shell, name, here, value, module, image, partition):
    job = JobConfig(env={"A_VALUE": value}, modules=[module], container_image=image, partition=partition)
    assert job.faults() == []
    status, calls, said = shell(script(job, name=name, here=f"/h/{here}"))
    assert status == 0, said
    loaded, started = calls
    assert loaded == ["module", "load", module]
    run = f"/h/{here}/runs/{name}"
    escaped = run.replace("%", "%%")
    assert started == [
        "srun", "--kill-on-bad-exit=0", "--wait=660", f"--output={escaped}/logs/%x-%j-r0-%t.log",
        f"--container-image={image}", f"--container-mounts=/h/{here}:/h/{here}", f"--container-workdir=/h/{here}",
        "reblock", "fit", "--config", f"{run}/job/config.yaml", "--run.resume", "true", "--trainer.num_nodes", "2",
        "--trainer.devices", "1",
    ]  # fmt: skip


@EXAMPLES
@given(base=WORD, shards=WORD, source=WORD, out=WORD, image=WORD)
def test_words_of_the_other_stages_stay_words(shell, base, shards, source, out, image):
    assume(not source.startswith("--") and not any(Path(word).exists() for word in (base, shards, source)))
    job = JobConfig(
        stages="encode,export", apptainer_image=image, encode=EncodeStage(shards=source), export=ExportStage(out=out)
    )
    prefix = ["apptainer", "exec", "--bind", "/home/a:/home/a", "--pwd", "/home/a", image, "reblock"]
    status, calls, said = shell(script(job, "encode", base=base, shards=shards))
    assert status == 0, said
    assert calls[0][2:] == [*prefix, "encode", source, shards, "--base", base, "--dtype=bfloat16"]
    assert shell(script(job, "export"))[1][0][2:] == [*prefix, "export", "/home/a/runs/tiny", out]


def test_a_container_sees_the_run_the_base_and_the_shards(shell, tmp_path):
    for name in ("base", "here/latents", "clips", "odd,name"):
        (tmp_path / name).mkdir(parents=True)
    job = JobConfig(container_image="x", encode=EncodeStage(shards=str(tmp_path / "clips" / "missing")))
    found = script(job, here=tmp_path / "here", base=tmp_path / "base", shards=str(tmp_path / "here" / "latents"))
    here = f"{tmp_path}/here"
    assert f"--container-mounts={here}:{here},{tmp_path}/base:{tmp_path}/base " in shell(found)[1][-1][5] + " "
    other = script(job, here=tmp_path / "here", base=tmp_path / "odd,name", shards="hub/id")
    assert f"--container-mounts={here}:{here}" == shell(other)[1][-1][5]
    job.container_mounts = "/a:/b"
    assert "--container-mounts=/a:/b" in shell(script(job))[1][-1]


def test_the_environment_reaches_the_tasks(shell, tmp_path):
    job = JobConfig(env={"NCCL_SOCKET_IFNAME": "ib0 $(x)"}, cpus_per_task=4)
    text = script(job).replace("srun --kill", "env > /dev/stderr; srun --kill")
    _, _, said = shell(text, MASTER_ADDR="127.0.0.1", RANK="3")
    expected = ("NCCL_SOCKET_IFNAME=ib0 $(x)", "REBLOCK_REQUEUE=script", "REBLOCK_STOP_SIGNAL=SIGUSR1",
                "OMP_NUM_THREADS=4", "SRUN_CPUS_PER_TASK=4")  # fmt: skip
    assert [line for line in expected if line not in said.splitlines()] == []
    assert "MASTER_ADDR" not in said and "\nRANK=" not in said


SHOW, REQUEUE = ["scontrol", "show", "job", "--oneliner", "7"], ["scontrol", "requeue", "7"]


@pytest.mark.parametrize(
    ("status", "restarts", "requeues", "says"),
    [
        (0, 0, [], "done"),
        (1, 0, [], "failed with status 1"),
        (143, 0, [SHOW], "failed with status 143"),
        (75, 0, [REQUEUE], "asks Slurm to queue the job again"),
        (75, 99, [REQUEUE], "start 100 (99 requeued)"),
        (75, 100, [], "after 100 requeues, the limit"),
    ],
)
def test_the_status_is_sruns_and_75_is_a_requeue(shell, status, restarts, requeues, says):
    found, calls, said = shell(script(), SRUN_STATUS=str(status), SLURM_RESTART_COUNT=str(restarts))
    assert found == status and calls[1:] == requeues and says in said
    assert calls[0][3] == f"--output=/home/a/runs/tiny/logs/%x-%j-r{restarts}-%t.log"


def test_a_preempted_job_that_ends_in_time_is_a_requeue(shell):
    found, calls, said = shell(script(), SRUN_STATUS="143", PREEMPTED="2026-11-26T01:14:20")
    assert found == 143 and calls[1:] == [SHOW, REQUEUE] and "asks Slurm to queue the job again" in said


def test_starts_without_a_new_checkpoint_are_not_queued_again_for_ever(shell, tmp_path):
    run = tmp_path / "runs" / "tiny"
    (run / "job").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    text = script(here=tmp_path)

    def start() -> bool:
        _, calls, said = shell(text, SRUN_STATUS="75")
        assert ("for the third time without a new checkpoint" in said) == (REQUEUE not in calls)
        return REQUEUE in calls

    assert [start() for _ in range(4)] == [True, True, False, True]  # by hand it may go on
    saves = text.replace("srun --kill", f"echo x >> {run}/checkpoints/last.ckpt; srun --kill")
    for _ in range(4):
        assert REQUEUE in shell(saves, SRUN_STATUS="75")[1]
    assert [start() for _ in range(3)] == [True, True, False]
    # Preemptions say nothing of the time that is given.
    assert all(REQUEUE in shell(text, SRUN_STATUS="143", PREEMPTED="2026-11-26")[1] for _ in range(5))


def test_a_job_that_was_submitted_by_hand_is_noted_once(shell, tmp_path):
    run = RunFolder(tmp_path / "runs" / "tiny")
    run.job_list.parent.mkdir(parents=True)
    note_job(run, "fit", "6", [], 2)
    for _ in range(2):
        assert shell(script(here=tmp_path))[0] == 0
    assert [entry["job"] for entry in noted_jobs(run)] == ["6", "7"]
    assert noted_jobs(run)[1].keys() == noted_jobs(run)[0].keys() and noted_jobs(run)[1]["stage"] == "fit"


def test_a_failing_module_or_setup_line_starts_nothing(shell):
    found, calls, _ = shell(script(JobConfig(setup=["false"])))
    assert found == 1 and calls == []


def test_an_array_task_is_queued_again_by_its_own_id(shell):
    job = JobConfig(stages="encode", encode=EncodeStage(shards="v"))
    assert shell(script(job, "encode"), SRUN_STATUS="75")[1][1:] == [["scontrol", "requeue", "5_3"]]


def test_line_breaks_are_no_directive():
    with pytest.raises(ValueError, match="without line breaks"):
        quote_directive("a\n#SBATCH --uid=0")
    assert directive(("comment", 'a "b" \\c')) == '#SBATCH --comment="a \\"b\\" \\\\c"'
    assert directive(("requeue", None)) == "#SBATCH --requeue" and directive("why") == "# why"
