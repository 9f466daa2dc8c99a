"""Signals that ask a run to end: held back by the kernel, looked at between steps, never acted on in the middle of one.

A signal that is blocked stays pending in the kernel: that is the flag. No handler runs in the middle of a backward
pass, a write or a lock, nothing that Lightning installs can run either, and child processes inherit the block, so that
a signal to a whole job (Slurm's, without cgroups) does not end loader workers. Imports nothing heavy: it must stand
before torch is imported.
"""

import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum

#: Commands that end between two steps with a checkpoint.
BETWEEN_STEPS = ("fit", "validate")
#: Commands that end at once, as by Ctrl-C, and lose what they were making: finished shards stay, claims run out.
AT_ONCE = ("encode",)


class Request(IntEnum):
    """What a process has been asked to do; of all ranks, the largest counts."""

    NOTHING = 0
    GO_ON_LATER = 1  # by the stop signal
    END = 2  # by SIGTERM

    @property
    def status(self) -> int:
        """The exit status of a process that has done so: 75 (EX_TEMPFAIL: go on later) or 143 (as by SIGTERM)."""
        return {Request.NOTHING: 0, Request.GO_ON_LATER: 75, Request.END: 128 + signal.SIGTERM}[self]


#: Exit status of a rank that could not write the state that it was stopped at; above 75, for srun gives the highest.
UNSAVED = 76


class Stopped(SystemExit):
    """Raised on every rank at the same place, once all have agreed to end; leaves with the request's status.

    A rank that then fails to write the state leaves with `UNSAVED`.

    Args:
        request: that all ranks follow.
        where: what had been done, in words.
    """

    def __init__(self, request: Request, where: str) -> None:
        super().__init__(request.status)
        self.request = request
        self.where = where


def stop_signal() -> signal.Signals:
    """SIGUSR1, or the one that REBLOCK_STOP_SIGNAL names.

    Raises:
        ValueError: if it names none that may be held back.
    """
    name = os.environ.get("REBLOCK_STOP_SIGNAL", "SIGUSR1")
    full = name if name.startswith("SIG") else f"SIG{name}"
    refused = ("SIGKILL", "SIGSTOP", "SIGTERM", "SIGINT", "SIGCHLD", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT")
    found = next((known for known in signal.Signals if known.name == full and full not in refused), None)
    if found is None:
        raise ValueError(
            f"got REBLOCK_STOP_SIGNAL={name!r}, expected a signal that Slurm can send and nothing else uses, such as "
            "SIGUSR1, SIGUSR2 or SIGURG; mend it in the job's script, together with its --signal."
        )
    return found


def listen(command: str) -> None:
    """From here on the stop signal (and SIGTERM, where a checkpoint is written) no longer ends this process.

    Called once, before anything long, in the process's only thread; threads and child processes inherit it.

    Raises:
        ValueError: if REBLOCK_STOP_SIGNAL names no signal.
    """
    if command in BETWEEN_STEPS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {stop_signal(), signal.SIGTERM})
        os.register_at_fork(after_in_child=_obey_the_parent)
    elif command in AT_ONCE:
        signal.pthread_sigmask(signal.SIG_BLOCK, {stop_signal()})
        threading.Thread(target=_interrupt, args=(stop_signal(),), name="stop-signal", daemon=True).start()


def requested() -> Request:
    """What this process has been asked by signals so far."""
    pending = signal.sigpending()
    if signal.SIGTERM in pending:
        return Request.END
    return Request.GO_ON_LATER if stop_signal() in pending else Request.NOTHING


_interrupted = threading.Event()


def status_of_interrupt() -> int:
    """The exit status after KeyboardInterrupt: 75 if the stop signal caused it, otherwise 130, as shells report it."""
    return Request.GO_ON_LATER.status if _interrupted.is_set() else 128 + signal.SIGINT


def _interrupt(awaited: signal.Signals) -> None:
    """Turns the stop signal into Ctrl-C for the main thread."""
    signal.sigwait({awaited})
    _interrupted.set()
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def _obey_the_parent() -> None:
    """In a forked child, a loader worker: SIGTERM ends it if its parent sends it, and only then.

    Slurm may send SIGTERM to every process of a job. A worker that it ended would fail the step that the parent wants
    to finish. Workers end with their parent anyway.
    """
    parent, end = os.getppid(), os._exit

    def wait(take: Callable = signal.sigwaitinfo) -> None:
        while take({signal.SIGTERM}).si_pid != parent:
            pass
        end(0)

    threading.Thread(target=wait, name="sigterm-of-parent", daemon=True).start()
