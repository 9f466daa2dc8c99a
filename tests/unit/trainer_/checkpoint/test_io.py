"""Checkpoints are written aside, one after another, each as it was when it was saved; a failed write loses nothing."""

import resource
import threading
from contextlib import contextmanager

import pytest
import torch
from lightning.pytorch import Trainer

from data.files import sync, temporaries
from launch.fit.last_checkpoint import LastCheckpoint
from launch.signals import UNSAVED, SignalRequest, Stopped
from tests.support.checkpoints import content, names, value_of
from trainer.checkpoint.io import BackgroundCheckpointIO
from trainer.run_files import LAST, PREVIOUS

#: Seconds within which whatever is waited for must have come.
LIMIT = 60


class SlowDisk:
    """Every file waits until it is let through to the disk."""

    def __init__(self, monkeypatch):
        self.reached, self._go = threading.Semaphore(0), threading.Semaphore(0)

        def slow(path):
            self.reached.release()
            assert self._go.acquire(timeout=LIMIT)
            sync(path)

        monkeypatch.setattr("trainer.checkpoint.file.sync", slow)

    def wait(self):
        assert self.reached.acquire(timeout=LIMIT)

    def let(self, count=1):
        self._go.release(count)


@pytest.fixture
def disk(monkeypatch):
    return SlowDisk(monkeypatch)


@contextmanager
def no_room():
    """Files of this process may not grow past 1,000 bytes, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_holds_what_was_there_when_it_was_saved(tmp_path, disk):
    """The write waits while every part of the checkpoint goes on changing."""
    files, live = BackgroundCheckpointIO(), content(1)
    files.save_checkpoint(live, tmp_path / LAST)
    disk.wait()
    files.save_checkpoint(live, tmp_path / "best-step=1.ckpt")  # waits for its turn
    live["state_dict"]["w"].fill_(2)
    live["optimizer_states"][0]["state"][0]["m"].fill_(2)
    live["loops"]["n"][0] = 2
    live["global_step"] = 2
    disk.let(2)
    files.wait()
    assert value_of(tmp_path / LAST) == value_of(tmp_path / "best-step=1.ckpt") == 1


def test_training_waits_for_the_third_save_only(tmp_path, disk):
    files = BackgroundCheckpointIO()
    files.save_checkpoint(content(1), tmp_path / LAST)
    files.save_checkpoint(content(2), tmp_path / LAST)
    disk.wait()
    third = threading.Thread(target=files.save_checkpoint, args=(content(3), tmp_path / LAST))
    third.start()
    third.join(0.3)
    assert third.is_alive() and len(names(tmp_path)) == 1 == len(temporaries(tmp_path, LAST))  # one write at a time
    disk.let()
    third.join(LIMIT)
    assert not third.is_alive()
    disk.let(2)
    files.wait()
    assert value_of(tmp_path / LAST) == 3 and value_of(tmp_path / PREVIOUS) == 2


def test_memory_is_used_again(tmp_path):
    files = BackgroundCheckpointIO()
    places = set()
    for value in range(6):
        snapshot = files._buffers.take(content(value))
        places.add(snapshot.content()["state_dict"]["w"].data_ptr())
        files._buffers.reuse(snapshot)
    assert len(places) == 1
    wide = torch.arange(1000.0)
    view = files._buffers.take({"w": wide[10:20]}).content()["w"]
    assert torch.equal(view, wide[10:20]) and view.untyped_storage().nbytes() == 40


def test_saved_in_the_foreground_a_file_is_there_at_once(tmp_path):
    files = BackgroundCheckpointIO(background=False)
    files.save_checkpoint(content(1), tmp_path / LAST)
    assert value_of(tmp_path / LAST) == 1


def test_reading_waits_for_the_write(tmp_path, disk):
    files = BackgroundCheckpointIO()
    files.save_checkpoint(content(1), tmp_path / LAST)
    threading.Timer(0.2, disk.let).start()
    assert files.load_checkpoint(tmp_path / LAST)["global_step"] == 1


def test_a_file_is_removed_only_after_its_successor_is_complete(tmp_path, disk):
    files = BackgroundCheckpointIO()
    files.save_checkpoint(content(1), tmp_path / "best-step=1.ckpt")
    disk.let()
    files.wait()
    files.save_checkpoint(content(2), tmp_path / "best-step=2.ckpt")
    files.remove_checkpoint(tmp_path / "best-step=1.ckpt")
    disk.wait(), disk.wait()
    assert value_of(tmp_path / "best-step=1.ckpt") == 1
    disk.let()
    files.wait()
    assert names(tmp_path) == {"best-step=2.ckpt"}


@pytest.mark.parametrize("background", [True, False])
def test_without_room_the_old_files_stay_and_the_next_save_tries_again(tmp_path, caplog, background):
    files = BackgroundCheckpointIO(background=background)
    for value, name in ((1, LAST), (2, LAST), (2, "best-step=2.ckpt")):
        files.save_checkpoint(content(value), tmp_path / name)
    files.wait()
    with no_room():
        files.save_checkpoint(content(3), tmp_path / "best-step=3.ckpt")
        files.remove_checkpoint(tmp_path / "best-step=2.ckpt")
        files.save_checkpoint(content(3), tmp_path / LAST)
        files.drain()
    assert names(tmp_path) == {LAST, PREVIOUS, "best-step=2.ckpt"}
    assert [value_of(tmp_path / n) for n in (PREVIOUS, LAST, "best-step=2.ckpt")] == [1, 2, 2]
    said = [record.getMessage() for record in caplog.records]
    assert any(f"{tmp_path / LAST} could not be written: File too large" in line for line in said), said
    assert any("bytes are free" in line and "failure 2 in a row, 5 are allowed" in line for line in said), said
    assert any("best-step=2.ckpt stays" in line for line in said), said
    files.save_checkpoint(content(4), tmp_path / LAST)
    files.wait()
    assert [value_of(tmp_path / n) for n in (PREVIOUS, LAST)] == [2, 4]


def test_one_failure_too_many_in_a_row_is_raised_by_the_next_save(tmp_path):
    files = BackgroundCheckpointIO(max_failures=2)
    for _ in range(2):  # a success in between starts the count anew
        with no_room():
            for _ in range(2):
                files.save_checkpoint(content(1), tmp_path / LAST)
            files.drain()
        files.save_checkpoint(content(2), tmp_path / LAST)
        files.drain()
    with no_room():
        for _ in range(3):
            files.save_checkpoint(content(3), tmp_path / LAST)
        files.drain()
    with pytest.raises(OSError, match="3 writes of checkpoints in a row have failed, 2 are allowed"):
        files.save_checkpoint(content(3), tmp_path / LAST)
    assert value_of(tmp_path / LAST) == 2


@pytest.mark.parametrize("end", ["wait", "teardown"])
@pytest.mark.parametrize("after", [[], ["best-step=1.ckpt"]], ids=["at the end", "before another file"])
def test_a_last_state_that_is_not_on_the_disk_is_an_error(tmp_path, end, after):
    files = BackgroundCheckpointIO()
    with no_room():
        files.save_checkpoint(content(1), tmp_path / LAST)
        files.drain()
    for name in after:
        files.save_checkpoint(content(1), tmp_path / name)
    with pytest.raises(OSError, match=f"the last checkpoint could not be written: .*{LAST}"):
        getattr(files, end)()
    files.wait()  # told once


def test_a_failed_best_file_is_no_error_once_another_file_is_written(tmp_path):
    files = BackgroundCheckpointIO()
    with no_room():
        files.save_checkpoint(content(1), tmp_path / "best-step=1.ckpt")
        files.drain()
    files.save_checkpoint(content(1), tmp_path / LAST)
    files.wait()
    assert names(tmp_path) == {LAST}


@pytest.mark.parametrize("told", ["check", "wait", "teardown"])
def test_what_cannot_be_saved_at_all_is_raised(tmp_path, told):
    files = BackgroundCheckpointIO()
    files.save_checkpoint({"x": lambda: None}, tmp_path / LAST)
    files.drain()
    with pytest.raises(Exception, match="pickle"):
        getattr(files, told)()
    assert names(tmp_path) == set()


def test_once_ready_a_save_neither_waits_nor_raises(tmp_path, disk):
    """Ranks get ready together, and rank zero alone saves: by then it must not give up alone."""
    files = BackgroundCheckpointIO(max_failures=0)
    files.save_checkpoint(content(1), tmp_path / LAST)
    files.save_checkpoint(content(2), tmp_path / LAST)
    disk.wait()
    ready = threading.Thread(target=files.make_ready)
    ready.start()
    ready.join(0.3)
    assert ready.is_alive()
    disk.let(2)
    ready.join(LIMIT)
    assert not ready.is_alive()
    disk.let(100)
    files.drain()
    with no_room():
        files._submit(files._write, files._buffers.take(content(3)), tmp_path / "best-step=3.ckpt")
        files.drain()
    files.save_checkpoint(content(4), tmp_path / LAST)
    files.drain()
    assert value_of(tmp_path / LAST) == 4
    with no_room():
        files.save_checkpoint(content(5), tmp_path / LAST)
        files.drain()
    with pytest.raises(OSError, match="1 writes of checkpoints in a row have failed, 0 are allowed"):
        files.make_ready()


def test_a_rank_that_cannot_save_where_it_stopped_says_so_by_its_status(tmp_path):
    trainer = Trainer(plugins=[BackgroundCheckpointIO()], logger=False, accelerator="cpu", default_root_dir=tmp_path)
    files, last = trainer.strategy.checkpoint_io, LastCheckpoint(tmp_path / LAST, 10)
    saved, unsaved = (Stopped(SignalRequest.RESUME_LATER, "after step 3") for _ in range(2))
    files.save_checkpoint(content(1), tmp_path / LAST)
    last.on_exception(trainer, None, saved)
    with no_room():
        files.save_checkpoint(content(2), tmp_path / LAST)
        last.on_exception(trainer, None, unsaved)
    assert (saved.code, unsaved.code) == (75, UNSAVED)
    assert UNSAVED > 75  # srun gives the highest of all tasks
    assert value_of(tmp_path / LAST) == 1
