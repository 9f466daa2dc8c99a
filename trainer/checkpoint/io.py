"""Checkpoint files that are complete or absent, hold no code, are read without running any, and are written aside."""

import errno
import logging
import os
import shutil
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from trainer.checkpoint.file import summarise, write_checkpoint
from trainer.checkpoint.host_snapshot import Snapshot, SnapshotBuffers
from trainer.run_files import LAST

log = logging.getLogger(__name__)

#: Bytes that a checkpoint leaves free: for what it holds beside tensors, and for the run's other files.
_MARGIN = 1 << 20


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place, forces it to the disk and renames it, all while training goes on.

    A save copies the checkpoint's tensors to host memory; a thread writes them. One file is written at a time, in the
    order of the saves, and one more snapshot may wait for its turn; a third waits in the save. Removing a file waits
    for the file that was saved before it, and is not done if that one could not be written. The file that `last.ckpt`
    replaces stays as `previous.ckpt`; at every moment one of the two is there and whole.

    A full disk, a quota or a lost server fails the write and not the run: the file keeps its last complete content, a
    warning says so, and the next save tries again. Any other error is raised by the next save or `wait`.

    Args:
        max_failures: writes that may fail in a row; after one more, the next save raises.
        background: write in a thread; off, a save returns when the file is on the disk.
    """

    def __init__(self, *, max_failures: int = 5, background: bool = True) -> None:
        self.max_failures = max_failures
        self.background = background
        self._memory = SnapshotBuffers()
        self._thread: ThreadPoolExecutor | None = None
        #: Whatever is not done yet, and of that the writes.
        self._jobs: deque[Future] = deque()
        self._writes: deque[Future] = deque()
        self._saved_last: Path | None = None
        self._ready = False
        #: Files whose last write failed, until another write succeeds; `last.ckpt` until it is written itself.
        self._unsaved: dict[Path, OSError] = {}
        self._failures = 0
        self._failure: OSError | None = None
        self._error: BaseException | None = None

    # -- what Lightning calls ------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies the checkpoint; its file is written in the background.

        Raises:
            OSError: if more writes than `max_failures` have failed in a row.
        """
        self.make_ready()
        self._ready = False
        self._saved_last = Path(path)
        job = self._do(self._write, self._memory.take(checkpoint), Path(path))
        self._writes.extend([job] if job else [])

    def make_ready(self) -> None:
        """Waits until a save need not wait; the next one then does not raise.

        Raises:
            OSError: as `save_checkpoint`.
        """
        if self._ready:
            return
        self.check()
        while len(self._writes) > 1:
            self._writes.popleft().result()
        self.check()
        self._ready = True

    def remove_checkpoint(self, path: str | Path) -> None:
        self._do(self._remove, Path(path), self._saved_last)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """The checkpoint's content.

        Raises:
            ValueError: if the file is missing, damaged, or holds anything but tensors and plain values.
        """
        self.settle()
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; expected a checkpoint. Start the run without run.resume.")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({summarise(error)}); expected a checkpoint "
                "that Reblock wrote. Resume from another one in the same folder by copying it to last.ckpt."
            ) from error

    def teardown(self) -> None:
        """Waits as `wait` does, and gives thread and memory back."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            self._memory.release()

    # -- what the run calls --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises what the background has met and nobody has been told of: a fault, or too many failed writes."""
        error, self._error = self._error, None
        if error is None and self._failures > self.max_failures:
            error = OSError(
                f"{self._failures} writes of checkpoints in a row have failed, {self.max_failures} are allowed "
                f"(run.save_failures). The last: {self._failure}. Free space, then resume."
            )
            self._unsaved, self._failures = {}, 0
        if error is not None:
            raise error

    def settle(self) -> None:
        """Returns when the background has nothing left to do; says nothing of how it went."""
        while self._jobs:
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Returns when every file is on the disk.

        Raises:
            OSError: if the last write of `last.ckpt`, or the last write of all, has failed.
        """
        self.settle()
        self.check()
        unsaved, self._unsaved, self._failures = self._unsaved, {}, 0
        if unsaved:
            faults = "; ".join(f"{path} ({error})" for path, error in unsaved.items())
            raise OSError(f"the last checkpoint could not be written: {faults}. The one before it is whole.")

    # -- the background ------------------------------------------------------------------------------------------

    def _do(self, job: Callable[..., None], *arguments: Any) -> Future | None:
        if not self.background:
            self._guarded(job, *arguments)
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft()
        self._jobs.append(self._thread.submit(self._guarded, job, *arguments))
        return self._jobs[-1]

    def _guarded(self, job: Callable[..., None], *arguments: Any) -> None:
        try:
            job(*arguments)
        except BaseException as error:  # the next save or `wait` raises it
            self._error = error

    def _write(self, snapshot: Snapshot, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Not begun where it cannot fit: it would fill the disk for a while, and others' writes would fail too.
            if shutil.disk_usage(path.parent).free < snapshot.nbytes + _MARGIN:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for {snapshot.nbytes:,} bytes", str(path))
            write_checkpoint(snapshot.content(), path)
        except OSError as error:
            self._failures += 1
            self._failure = error
            self._unsaved = self._unsaved | {path: error}
            log.warning(
                "%s could not be written: %s; %s. What was there before is whole; the next save tries again "
                "(failure %d in a row, %d are allowed).",
                path, error.strerror, _free(path.parent), self._failures, self.max_failures,
            )  # fmt: skip
        else:
            self._failures = 0
            self._unsaved = {p: e for p, e in self._unsaved.items() if p.name == LAST and p != path}
        finally:
            self._memory.give_back(snapshot)

    def _remove(self, path: Path, successor: Path | None) -> None:
        if successor in self._unsaved:
            log.warning("%s stays, since %s, which was to replace it, could not be written.", path, successor)
            return
        path.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,} bytes are free"
    except OSError as error:
        return f"its free space cannot be asked for ({error.strerror})"
