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

#: Seconds after which a child that has not reported counts as stuck, and children that are forked for one process. A
#: slow child that is replaced has done nothing: it waits until its parent has heard of it.
_START_TIMEOUT, _ATTEMPTS = 5.0, 20
#: Linux's prctl, and its request for a signal at the end of the thread that forked the process. Looked up here, since a
#: forked process should not wait for the loader's lock.
_PRCTL, _SIGNAL_AT_PARENTS_END = (ctypes.CDLL(None).prctl if sys.platform == "linux" else None), 1


def fork() -> int:
    """`os.fork`; a child that does not start is killed, and another one is forked.

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

    A loader process looks for its parent every five seconds only. It holds a copy of the rank's connections, so that
    the other ranks would learn of a killed one no sooner.
    """
    if _PRCTL is not None:
        _PRCTL(_SIGNAL_AT_PARENTS_END, int(signal.SIGKILL))
        if os.getppid() != parent:  # it has ended before
            os._exit(1)


class _Popen(popen_fork.Popen):
    def _launch(self, process_obj: process.BaseProcess) -> None:  # the parent class's method with another fork
        parent = os.getpid()
        lasting = threading.current_thread() is threading.main_thread()  # another thread may end before the process
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
