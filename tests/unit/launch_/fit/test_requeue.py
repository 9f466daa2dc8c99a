"""Which job is queued again, and by whom."""

from pathlib import Path

import pytest

from launch.fit import requeue


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """(status, shows) -> inside a batch job whose `scontrol` notes its arguments, prints and exits so; the notes."""
    for name in ("REBLOCK_REQUEUE", "SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)

    def inside(status: int = 0, shows: str = "") -> Path:
        notes, tool = tmp_path / "notes", tmp_path / "bin" / "scontrol"
        tool.parent.mkdir()
        tool.write_text(f'#!/bin/sh\necho "$@" >> {notes}\necho "not today" >&2\necho "{shows}"\nexit {status}\n')
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tool.parent}:/usr/bin:/bin")
        monkeypatch.setenv("SLURM_JOB_ID", "1234")
        return notes

    return inside


def test_a_job_queues_itself_again(slurm):
    notes = slurm()
    assert requeue.mode() == "self"
    assert requeue.requeue() == "job 1234 is queued again"
    assert notes.read_text() == "requeue 1234\n"


def test_of_an_array_only_the_own_task(slurm, monkeypatch):
    notes = slurm()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "1200")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    requeue.requeue()
    assert notes.read_text() == "requeue 1200_7\n"


def test_a_refusal_is_told_and_no_error(slurm):
    slurm(status=1)
    assert requeue.requeue() == ("not queued again: scontrol exited with 1: not today; go on with --run.resume true")
    assert not requeue.preempted()


def test_without_a_job_there_is_nothing_to_queue(slurm):
    assert requeue.mode() == "never"
    assert "no Slurm job" in requeue.requeue()


def test_a_missing_scontrol_is_told(slurm, monkeypatch, tmp_path):
    slurm()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert requeue.mode() == "never"
    assert "not queued again: " in requeue.requeue() and "scontrol" in requeue.requeue()


@pytest.mark.parametrize(("time", "found"), [("None", False), ("2026-11-26T01:14:20", True)])
def test_a_preempted_job_has_a_time_of_its_preemption(slurm, time, found):
    notes = slurm(shows=f"JobId=1234 PreemptEligibleTime=2026-11-26T01:14:17 PreemptTime={time} SuspendTime=None")
    assert requeue.preempted() is found
    assert notes.read_text() == "show job --oneliner 1234\n"


@pytest.mark.parametrize("name", ["bash", "interactive"])
def test_an_interactive_job_is_left_alone(slurm, monkeypatch, name):
    slurm()
    monkeypatch.setenv("SLURM_JOB_NAME", name)
    assert requeue.mode() == "never"


def test_the_variable_decides(slurm, monkeypatch):
    slurm()
    for word in ("self", "script", "never"):
        monkeypatch.setenv("REBLOCK_REQUEUE", word)
        assert requeue.mode() == word
    monkeypatch.setenv("REBLOCK_REQUEUE", "yes")
    with pytest.raises(ValueError, match="expected one of: self, script, never"):
        requeue.mode()
