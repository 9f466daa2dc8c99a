"""A CheckpointIO that writes files atomically, in the background, and reads them without running code from them."""

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

#: Bytes that must stay free beside a checkpoint's tensors: for its other values, and the run's other files.
_MARGIN = 1 << 20


class BackgroundCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically and while training goes on.

    A save copies the checkpoint's tensors to host memory, and a thread writes them to the file. The thread writes one
    file at a time, in the order of the saves. One more snapshot may be queued; a third save waits for its turn. A file
    is removed only after the one that was saved before the removal is complete, and not at all if that one could not be
    written. The file that `last.ckpt` replaces becomes `previous.ckpt`; at every moment one of the two is complete.

    A full disk, a quota or a lost file server fails the write but not the run: the file keeps its last complete
    content, a warning names the error, and the next save tries again. Any other error is raised by the next save or by
    `wait`.

    Args:
        max_failures: writes that may fail in a row; after one more, the next save raises.
        background: write in a thread; off, a save returns when the file is on the disk.
    """

    def __init__(self, *, max_failures: int = 5, background: bool = True) -> None:
        self.max_failures = max_failures
        self.background = background
        self._buffers = SnapshotBuffers()
        self._thread: ThreadPoolExecutor | None = None
        #: Everything that is queued or running, and the writes among it.
        self._jobs: deque[Future] = deque()
        self._writes: deque[Future] = deque()
        self._saved_last: Path | None = None
        self._ready = False
        #: Files whose last write failed. A later write that succeeds clears them; only its own clears `last.ckpt`.
        self._unsaved: dict[Path, OSError] = {}
        self._failures = 0
        self._failure: OSError | None = None
        self._error: BaseException | None = None

    # -- called by Lightning ------------------------------------------------------------------------------------

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Copies the checkpoint and queues the writing of its file.

        Raises:
            OSError: if more writes than `max_failures` have failed in a row.
        """
        self.make_ready()
        self._ready = False
        self._saved_last = Path(path)
        job = self._submit(self._write, self._buffers.take(checkpoint), Path(path))
        self._writes.extend([job] if job else [])

    def make_ready(self) -> None:
        """Waits until a snapshot can be queued; the save that follows neither waits nor raises.

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
        self._submit(self._remove, Path(path), self._saved_last)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """The checkpoint's content.

        Raises:
            ValueError: if the file is missing, damaged, or holds anything but tensors and plain values.
        """
        self.drain()
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
        """Waits as `wait` does, then ends the thread and frees the buffers."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
                self._thread = None
            self._buffers.release()

    # -- called by the run --------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raises an error of the thread that was not raised yet, or if too many writes in a row have failed."""
        error, self._error = self._error, None
        if error is None and self._failures > self.max_failures:
            error = OSError(
                f"{self._failures} writes of checkpoints in a row have failed, {self.max_failures} are allowed "
                f"(run.save_failures). The last: {self._failure}. Free space, then resume."
            )
            self._unsaved, self._failures = {}, 0
        if error is not None:
            raise error

    def drain(self) -> None:
        """Waits until nothing is queued or running; raises no error of it."""
        while self._jobs:
            self._jobs.popleft().result()

    def wait(self) -> None:
        """Waits until every file is on the disk.

        Raises:
            OSError: if the last write of `last.ckpt`, or the last write of all, has failed.
        """
        self.drain()
        self.check()
        unsaved, self._unsaved, self._failures = self._unsaved, {}, 0
        if unsaved:
            faults = "; ".join(f"{path} ({error})" for path, error in unsaved.items())
            raise OSError(f"the last checkpoint could not be written: {faults}. The one before it is whole.")

    # -- the background ------------------------------------------------------------------------------------------

    def _submit(self, job: Callable[..., None], *arguments: Any) -> Future | None:
        if not self.background:
            self._run_job(job, *arguments)
            return None
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft()
        self._jobs.append(self._thread.submit(self._run_job, job, *arguments))
        return self._jobs[-1]

    def _run_job(self, job: Callable[..., None], *arguments: Any) -> None:
        try:
            job(*arguments)
        except BaseException as error:  # the next save or `wait` raises it
            self._error = error

    def _write(self, snapshot: Snapshot, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # A file that cannot fit is not begun: it would fill the disk for a while, and other writes would fail too.
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
            self._buffers.reuse(snapshot)

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
