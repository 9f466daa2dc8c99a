"""Which checkpoint a run goes on from, and what a killed process has left beside it."""

import pytest

from launch.fit.resume import clear_leftovers, find_checkpoint, rename_damaged
from launch.run_folder import RunFolder
from tests.support.checkpoints import content, value_of
from trainer.checkpoint.file import write_checkpoint


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of the steps 1 and 2."""
    run = RunFolder(tmp_path)
    run.checkpoints.mkdir()
    for value in (1, 2):
        write_checkpoint(content(value), run.last_checkpoint)
    return run


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def test_the_one_before_is_used_where_the_last_is_damaged_and_said(run, capsys):
    last, previous = run.last_checkpoint, run.previous_checkpoint
    assert find_checkpoint(run) == last and capsys.readouterr().out == ""
    cut(last)
    assert find_checkpoint(run) == previous
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{last} cannot be read" in said and f"the one before it, {previous}" in said
    assert last.is_file()  # as it was, until the run goes on
    rename_damaged(last)
    assert find_checkpoint(run) == previous and f"{last} is missing; going on from" in capsys.readouterr().out
    write_checkpoint(content(3), last)
    assert value_of(previous) == 1 and value_of(last) == 3  # the damaged one did not take its place
    assert last.with_name("last.ckpt.damaged").is_file()


def test_without_a_whole_one_the_run_is_refused(run):
    last, previous = run.last_checkpoint, run.previous_checkpoint
    cut(last), cut(previous)
    with pytest.raises(ValueError, match=f"{last} cannot be read .* and {previous} cannot be read"):
        find_checkpoint(run)
    last.unlink(), previous.unlink()
    assert find_checkpoint(run) is None


def test_half_files_are_cleared_away_and_nothing_else(tmp_path):
    half = [
        "metrics.csv.tmp", "graft.safetensors.tmp", "checkpoints/last.ckpt.tmp", "checkpoints/previous.ckpt.tmp",
        "checkpoints/.last.ckpt.0123.part", ".graft.safetensors.0123.part",
        "measurements/.sinks-base.npz.0123.part", "figures/.sinks-base.png.0123.part",
    ]  # fmt: skip
    full = ["metrics.csv", "checkpoints/last.ckpt", "checkpoints/last.ckpt.damaged", "measurements/sinks-base.npz"]
    for name in half + full:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    clear_leftovers(RunFolder(tmp_path))
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == sorted(full)
