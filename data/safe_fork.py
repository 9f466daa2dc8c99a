"""Forked processes that are sure to start.

In a process with several threads, a lock that another thread holds at the moment of the fork can stop the child before
its first line of Python. Python before 3.11.10 then leaves it waiting for ever
(https://github.com/python/cpython/issues/112275). Ranks have such threads: gloo's and autograd's.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import popen_fork, process, util
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, ForkContext

#: Seconds to wait for a child's first sign of life, and how often a fork is tried. A child that is only slow can be
#: killed: it does nothing before its parent answers.
_START_TIMEOUT, _ATTEMPTS = 5.0, 20
#: prctl and PR_SET_PDEATHSIG: the kernel signals this process when the thread that forked it ends. Looked up at import,
#: since a lookup in a forked child might wait for the dynamic linker's lock.
_PRCTL, _SIGNAL_AT_PARENTS_END = (ctypes.CDLL(None).prctl if sys.platform == "linux" else None), 1


def fork() -> int:
    """`os.fork`; a child that does not start is killed, and another one is forked.

    The child writes one byte when it runs, and goes on only after the parent's byte.

    Raises:
        RuntimeError: if no child starts.
    """
    for _ in range(_ATTEMPTS):
        started_reader, started_writer = os.pipe()
        go_reader, go_writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(started_reader)
            os.close(go_writer)
            with contextlib.suppress(BrokenPipeError):
                os.write(started_writer, b".")
            if not os.read(go_reader, 1):
                os._exit(1)  # the parent has ended
            os.close(started_writer)
            os.close(go_reader)
            return 0
        os.close(started_writer)
        os.close(go_reader)
        try:
            if wait([started_reader], _START_TIMEOUT):
                with contextlib.suppress(BrokenPipeError):  # the child has died: whoever waits for it will see that
                    os.write(go_writer, b".")
                return pid
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        finally:
            os.close(started_reader)
            os.close(go_writer)
    raise RuntimeError(f"{_ATTEMPTS} forked processes in a row did not start within {_START_TIMEOUT:.0f} s each")


def _end_with(parent: int) -> None:
    """Lets the kernel kill this process when `parent` ends.

    A loader process checks only every five seconds whether its parent lives. Until it ends, its copies of the rank's
    connections stay open, and the other ranks do not notice that the rank was killed.
    """
    if _PRCTL is not None:
        _PRCTL(_SIGNAL_AT_PARENTS_END, int(signal.SIGKILL))
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


class _Popen(popen_fork.Popen):
    def _launch(self, process_obj: process.BaseProcess) -> None:  # `popen_fork.Popen._launch`, with our `fork`
        parent = os.getpid()
        # The kernel follows the forking thread, and only the main thread lives as long as the process.
        lasting = threading.current_thread() is threading.main_thread()
        parent_reads, child_holds = os.pipe()
        child_reads, parent_holds = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(parent_reads)
                os.close(parent_holds)
                if lasting:
                    _end_with(parent)
                code = process_obj._bootstrap(parent_sentinel=child_reads)  # type: ignore[attr-defined]
            finally:
                os._exit(code)
        os.close(child_holds)
        os.close(child_reads)
        self.finalizer = util.Finalize(self, util.close_fds, (parent_reads, parent_holds))  # type: ignore[attr-defined]
        self.sentinel = parent_reads


class _Process(process.BaseProcess):
    _start_method = "fork"

    @staticmethod
    def _Popen(process_obj: process.BaseProcess) -> _Popen:  # multiprocessing's name
        return _Popen(process_obj)


class _Context(ForkContext):
    Process = _Process  # type: ignore[assignment]


def fork_context() -> BaseContext | None:
    """Multiprocessing context whose processes start by `fork`; None where Python does not fork by default."""
    return _Context() if multiprocessing.get_start_method() == "fork" else None
