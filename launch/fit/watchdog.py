"""Ends a rank that makes no progress and writes the stacks of all its threads; a hung run would waste its nodes."""

import faulthandler
import os
import socket
import sys
import threading
import time
from datetime import datetime
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from launch.run_folder import RunFolder
from trainer.callbacks.probe_callback import ProbeCallback

#: Exit status of a rank that the watchdog ends (EX_SOFTWARE).
EXIT_STATUS = 70
#: Factor on the deadline until the first step is done, since that includes loading the base and compilation.
FIRST_STEP_FACTOR = 4
#: Seconds that a rank waits before it exits, so that ranks that wait for it reach their own deadline first.
_GRACE = 5.0
#: File descriptor of standard error, which does not change if `sys.stderr` is replaced.
_STDERR = 2


class Watchdog(Callback):
    """A thread that ends the process if it makes no progress within a deadline.

    Progress is a finished training batch, validation batch, measured batch or checkpoint. Each rank watches itself and
    writes its own RUN/stacks/rank-N.txt, also if it only waits for a hung rank. The hung rank is the one whose stack is
    not in a collective.

    Args:
        run: the run folder.
        deadline: largest time without progress in seconds.
    """

    def __init__(self, run: RunFolder, deadline: float) -> None:
        self.run = run
        self.deadline = deadline
        self._last = (time.monotonic(), "start")
        self._stepped = False
        self._over = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._finished("start", stepped=False)
        self._over.clear()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ProbeCallback):
                callback.after_batch.append(lambda: self._finished("a measured batch"))
        self._arm()
        place = f"rank {trainer.global_rank} of {trainer.world_size}"
        self._thread = threading.Thread(
            target=self._watch, args=(trainer.global_rank, place), name="reblock-watchdog", daemon=True
        )
        self._thread.start()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished("loading the base")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._finished(f"training batch {batch_idx} of epoch {trainer.current_epoch}", stepped=True)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._finished(f"validation batch {batch_idx}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._finished(f"collecting the checkpoint of step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finished("training")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning skips teardown if a fit fails, so a failed fit that hangs while it exits is ended too.
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _finished(self, what: str, *, stepped: bool | None = None) -> None:
        self._stepped = self._stepped if stepped is None else stepped
        self._last = (time.monotonic(), what)

    def _watch(self, rank: int, place: str) -> None:
        while not self._over.wait(min(self.deadline / 10, 10.0)):
            allowed = self._arm()
            since, what = self._last
            idle = time.monotonic() - since
            if idle > allowed:
                self._end(
                    rank, f"{place} on {socket.gethostname()} has finished nothing for {idle:.1f} s; last: {what}"
                )

    def _arm(self) -> float:
        """Returns the current deadline in seconds, and sets a timer that ends the process soon after it.

        The timer also works if a call hangs while it holds the GIL, so that this thread never runs again.
        """
        allowed = self.deadline if self._stepped else FIRST_STEP_FACTOR * self.deadline
        faulthandler.dump_traceback_later(allowed + _GRACE, exit=True, file=_STDERR)
        return allowed

    def _end(self, rank: int, verdict: str) -> None:
        # Writing may hang too, so a timer ends the process in any case.
        faulthandler.dump_traceback_later(2 * _GRACE, exit=True, file=_STDERR)
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        verdict = f"{when} {verdict} (run.watchdog_s {self.deadline:g}). All threads:\n"
        print(verdict, file=sys.__stderr__, flush=True)
        faulthandler.dump_traceback(_STDERR)
        path = self.run.stacks(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(verdict)
            file.flush()
            faulthandler.dump_traceback(file)
            file.write("\n")
        time.sleep(_GRACE)
        os._exit(EXIT_STATUS)
