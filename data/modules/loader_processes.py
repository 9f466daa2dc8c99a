"""Forks that come to life: what other threads do at that moment can stop a forked process before its first line.

Python before 3.11.10 leaves the child waiting for ever for a lock that another thread held at the fork
(https://github.com/python/cpython/issues/112275). Ranks have such threads: gloo's, autograd's.
"""

import contextlib
import multiprocessing
import os
import signal
from multiprocessing import popen_fork, process, util
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, ForkContext

#: Seconds after which a forked process counts as stopped, and forks for one process. A slow one loses nothing: it does
#: nothing before it is told to go on.
_LIMIT, _TRIES = 5.0, 20


def fork() -> int:
    """`os.fork`; a child that does not come to life is ended and forked again.

    Raises:
        RuntimeError: if none does.
    """
    for _ in range(_TRIES):
        alive, says_alive = os.pipe()
        may_go, says_go = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(alive)
            os.close(says_go)
            with contextlib.suppress(BrokenPipeError):
                os.write(says_alive, b".")
            if not os.read(may_go, 1):
                os._exit(1)  # the parent has ended
            os.close(says_alive)
            os.close(may_go)
            return 0
        os.close(says_alive)
        os.close(may_go)
        try:
            if wait([alive], _LIMIT):
                with contextlib.suppress(BrokenPipeError):  # it has died: whoever waits for it will see that
                    os.write(says_go, b".")
                return pid
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        finally:
            os.close(alive)
            os.close(says_go)
    raise RuntimeError(f"{_TRIES} forked processes in a row did not come to life within {_LIMIT:.0f} s each")


class _Popen(popen_fork.Popen):
    def _launch(self, process_obj: process.BaseProcess) -> None:  # as its parent class, but for the fork
        parent_reads, child_holds = os.pipe()
        child_reads, parent_holds = os.pipe()
        self.pid = fork()
        if self.pid == 0:
            code = 1
            try:
                os.close(parent_reads)
                os.close(parent_holds)
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


def loader_context() -> BaseContext | None:
    """What a `DataLoader` makes its processes with; None, where they are not forked, for the usual way."""
    return _Context() if multiprocessing.get_start_method() == "fork" else None
