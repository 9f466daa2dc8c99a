"""One of `last.ckpt` and `previous.ckpt` is whole at every moment; damage is found wherever it is."""

import os
import signal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.fit.resume import clear_leftovers, find_checkpoint
from launch.run_folder import RunFolder
from tests.support.checkpoints import content, value_of
from trainer.checkpoint.file import checkpoint_fault, write_checkpoint
from trainer.run_files import LAST, PREVIOUS

#: System calls that a process may be killed before or after; counted through all saves.
CALLS = ("fsync", "link", "replace", "unlink")


def save_until_killed(folder, at: int, links: bool) -> tuple[int, bool]:
    """A process that saves 1, 2, 3 ... as last.ckpt and kills itself before its call `at`.

    Returns:
        What it had saved completely, and whether it came to its end.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call, name):
            def run(*arguments, **options):
                nonlocal count
                count += 1
                if count == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                if name == "link" and not links:
                    os.stat(arguments[0])
                    raise PermissionError(1, "Operation not permitted")
                return call(*arguments, **options)

            return run

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name), name))
        for value in (1, 2, 3, 4):
            write_checkpoint(content(value), folder / LAST)
            os.write(writer, bytes([value]))
        os._exit(0)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    done = os.read(reader, 10)
    os.close(reader)
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 or os.WTERMSIG(status) == signal.SIGKILL
    return max(done, default=0), os.WIFEXITED(status)


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_killed_before_any_call_it_leaves_a_whole_checkpoint(tmp_path, links):
    moments, ended = 0, False
    while not ended:
        run = RunFolder(tmp_path / str(moments))
        folder = run.checkpoints
        folder.mkdir(parents=True)
        moments += 1
        saved, ended = save_until_killed(folder, moments, links)
        found = find_checkpoint(run)
        if saved == 0:
            assert found is None or value_of(found) == 1
        else:
            assert value_of(found) in (saved, saved + 1)  # killed after the rename, before it could say so
        clear_leftovers(RunFolder(tmp_path))  # a run folder of another layout: nothing of this one
        for path in folder.glob("*.ckpt"):
            assert checkpoint_fault(path) is None
    assert moments > 12
    assert {p.name for p in folder.iterdir()} == {LAST, PREVIOUS}
    assert [value_of(folder / name) for name in (PREVIOUS, LAST)] == [3, 4]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.ckpt"
    write_checkpoint(content(1), path)
    return path


def same(a, b) -> bool:
    return str(a) == str(b) and torch.equal(a["state_dict"]["w"], b["state_dict"]["w"])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_byte_is_found_or_changes_nothing(whole, data):
    content_bytes = bytearray(whole.read_bytes())
    place = data.draw(st.integers(0, len(content_bytes) - 1))
    content_bytes[place] ^= data.draw(st.integers(1, 255))
    damaged = whole.with_name("byte.ckpt")
    damaged.write_bytes(content_bytes)
    if checkpoint_fault(damaged) is None:
        assert same(torch.load(damaged, weights_only=True), torch.load(whole, weights_only=True))


def test_a_flipped_bit_in_a_tensor_is_found_though_torch_reads_it(whole):
    content_bytes = bytearray(whole.read_bytes())
    content_bytes[content_bytes.index(torch.ones(10).numpy().tobytes()) + 20] ^= 1
    damaged = whole.with_name("bit.ckpt")
    damaged.write_bytes(content_bytes)
    assert not torch.equal(torch.load(damaged, weights_only=True)["state_dict"]["w"], torch.ones(300, 7))
    assert "CRC-32" in checkpoint_fault(damaged)


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_found(whole, share):
    damaged = whole.with_name("cut.ckpt")
    damaged.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
    assert checkpoint_fault(damaged) is not None


def test_a_file_without_what_a_run_needs_is_damaged(tmp_path):
    write_checkpoint({"state_dict": {}, "loops": {}}, tmp_path / LAST)
    assert checkpoint_fault(tmp_path / LAST) == "it lacks global_step, callbacks, optimizer_states, lr_schedulers"
    assert checkpoint_fault(tmp_path / "absent.ckpt") is not None
