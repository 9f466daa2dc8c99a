"""Signals that ask a run to end. They are blocked, and a run checks for pending ones between steps.

A blocked signal stays pending in the kernel, which serves as the flag. So no handler, not even one of Lightning's,
interrupts a backward pass, a write or a lock. Child processes inherit the block, so a signal to all processes of a job
(from Slurm without cgroups) does not end loader workers. This module imports nothing slow, since signals must be
blocked before torch is imported.
"""

import os
import signal
import threading
from collections.abc import Callable
from enum import IntEnum

#: Commands that end between two steps, with a checkpoint.
BETWEEN_STEPS = ("fit", "validate")
#: Commands that end at once, as on Ctrl-C. They lose the unfinished shard; finished shards stay and leases expire.
AT_ONCE = ("encode",)


class SignalRequest(IntEnum):
    """What signals have asked a process to do. The largest value over all ranks counts."""

    NOTHING = 0
    RESUME_LATER = 1  # by the stop signal
    TERMINATE = 2  # by SIGTERM

    @property
    def status(self) -> int:
        """Exit status after the request: 75 (EX_TEMPFAIL, the run is to be resumed) or 143 (as after SIGTERM)."""
        return {
            SignalRequest.NOTHING: 0,
            SignalRequest.RESUME_LATER: 75,
            SignalRequest.TERMINATE: 128 + signal.SIGTERM,
        }[self]


#: Exit status of a rank that could not save its state; above 75, since srun returns the highest status.
UNSAVED = 76


class Stopped(SystemExit):
    """Raised on all ranks at the same point to end the run; the process exits with the request's status.

    A rank that then fails to save its state exits with `UNSAVED`.

    Args:
        request: the strongest request over all ranks.
        where: point at which the run stopped, as text.
    """

    def __init__(self, request: SignalRequest, where: str) -> None:
        super().__init__(request.status)
        self.request = request
        self.where = where


def stop_signal() -> signal.Signals:
    """The stop signal: the one that REBLOCK_STOP_SIGNAL names, or SIGUSR1.

    Raises:
        ValueError: if the variable names no signal that may be blocked.
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


def block_signals(command: str) -> None:
    """Blocks the stop signal, and SIGTERM too in commands that save a checkpoint.

    Call it once, first and while the process has one thread, since later threads and child processes inherit the block.

    Raises:
        ValueError: if REBLOCK_STOP_SIGNAL names no signal that may be blocked.
    """
    if command in BETWEEN_STEPS:
        signal.pthread_sigmask(signal.SIG_BLOCK, {stop_signal(), signal.SIGTERM})
        os.register_at_fork(after_in_child=_end_on_sigterm_of_parent)
    elif command in AT_ONCE:
        signal.pthread_sigmask(signal.SIG_BLOCK, {stop_signal()})
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background job
            signal.signal(signal.SIGINT, _interrupt_if_asked)
        threading.Thread(target=_interrupt, args=(stop_signal(),), name="stop-signal", daemon=True).start()


def requested() -> SignalRequest:
    """The strongest request of the signals that this process has received."""
    pending = signal.sigpending()
    if signal.SIGTERM in pending:
        return SignalRequest.TERMINATE
    return SignalRequest.RESUME_LATER if stop_signal() in pending else SignalRequest.NOTHING


_interrupted = threading.Event()


def status_of_interrupt() -> int:
    """Exit status after KeyboardInterrupt: 75 if the stop signal caused it, otherwise 130, as after SIGINT."""
    return SignalRequest.RESUME_LATER.status if _interrupted.is_set() else 128 + signal.SIGINT


def _interrupt(awaited: signal.Signals) -> None:
    """Waits for the stop signal, and then interrupts the main thread like Ctrl-C."""
    signal.sigwait({awaited})
    _interrupted.set()
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def _interrupt_if_asked(number: int, frame: object) -> None:
    """Handles SIGINT where this process was started with SIGINT ignored: only the stop signal interrupts it."""
    if _interrupted.is_set():
        raise KeyboardInterrupt


def _end_on_sigterm_of_parent() -> None:
    """Makes a forked child (a loader worker) exit on SIGTERM from its parent, but not from other processes.

    Slurm may send SIGTERM to every process of a job. If that ended a worker, the parent could not complete its step.
    Workers end with their parent anyway.
    """
    parent, end = os.getppid(), os._exit

    def wait(take: Callable = signal.sigwaitinfo) -> None:
        while take({signal.SIGTERM}).si_pid != parent:
            pass
        end(0)

    threading.Thread(target=wait, name="sigterm-of-parent", daemon=True).start()
