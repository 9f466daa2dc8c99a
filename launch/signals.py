"""Signals that ask a run to end: blocked, looked at between steps, never acted on in the middle of one.

A signal that is blocked stays pending in the kernel: that is the flag. No handler runs in the middle of a backward
pass, a write or a lock, nor does any that Lightning installs; and child processes inherit the block, so that a signal
to a whole job (Slurm's, without cgroups) does not end loader workers. Imports nothing that takes long: signals must be
blocked before torch is imported.
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


class SignalRequest(IntEnum):
    """What a process has been asked to do by signals; of all ranks, the largest counts."""

    NOTHING = 0
    RESUME_LATER = 1  # by the stop signal
    TERMINATE = 2  # by SIGTERM

    @property
    def status(self) -> int:
        """Exit status of a process that has followed it: 75 (EX_TEMPFAIL: to be resumed) or 143 (as by SIGTERM)."""
        return {
            SignalRequest.NOTHING: 0,
            SignalRequest.RESUME_LATER: 75,
            SignalRequest.TERMINATE: 128 + signal.SIGTERM,
        }[self]


#: Exit status of a rank that could not write the state that it stopped at; above 75, for srun returns the highest.
UNSAVED = 76


class Stopped(SystemExit):
    """Raised on every rank at the same place, once all have agreed to end; the process exits with the request's status.

    A rank that then fails to write the state exits with `UNSAVED`.

    Args:
        request: that all ranks follow.
        where: after what it stopped, in words.
    """

    def __init__(self, request: SignalRequest, where: str) -> None:
        super().__init__(request.status)
        self.request = request
        self.where = where


def stop_signal() -> signal.Signals:
    """SIGUSR1, or the one that REBLOCK_STOP_SIGNAL names.

    Raises:
        ValueError: if it names none that may be blocked.
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
    """Keeps the stop signal (and SIGTERM, where a checkpoint is written) from ending this process from here on.

    Called once, before anything that takes long, in the process's only thread; threads and child processes inherit it.

    Raises:
        ValueError: if REBLOCK_STOP_SIGNAL names no signal.
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
    """What this process has been asked by signals so far."""
    pending = signal.sigpending()
    if signal.SIGTERM in pending:
        return SignalRequest.TERMINATE
    return SignalRequest.RESUME_LATER if stop_signal() in pending else SignalRequest.NOTHING


_interrupted = threading.Event()


def status_of_interrupt() -> int:
    """The exit status after KeyboardInterrupt: 75 if the stop signal caused it, otherwise 130, as shells report it."""
    return SignalRequest.RESUME_LATER.status if _interrupted.is_set() else 128 + signal.SIGINT


def _interrupt(awaited: signal.Signals) -> None:
    """Turns the stop signal into Ctrl-C for the main thread."""
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
