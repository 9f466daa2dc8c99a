"""One process beside this one, for a call that may hang or crash where `data.video.workers` cannot be.

Loader processes may not start any by `multiprocessing`, and there is one of this kind for each of them.
"""

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from data.modules.loader_processes import fork
from data.video.worker_process import Failure, Raised, answer, why_it_ended


class _Child:
    """A forked process that answers calls. It ends with this one, however that ends."""

    def __init__(self) -> None:
        self.connection, theirs = multiprocessing.Pipe()
        watched, self._alive = multiprocessing.Pipe(duplex=False)
        self._pid = fork()
        if self._pid == 0:
            try:
                self.connection.close()
                self._alive.close()
                _serve(theirs, watched)
            finally:
                os._exit(0)  # nothing of the parent is cleaned up here
        theirs.close()
        watched.close()

    def end(self) -> int:
        """Its exit code, negative for a signal; it is killed if it is still there."""
        self.connection.close()  # one that waits for calls ends by itself
        self._alive.close()
        os.kill(self._pid, signal.SIGKILL)  # until it is waited for, its number is no other's
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


def _serve(connection: Connection, watched: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, args=(watched,), daemon=True).start()
    torch.set_num_threads(1)  # the parent's other threads are not here
    answer(connection)


def _end_with_parent(watched: Connection) -> None:
    watched.poll(None)  # nothing is ever sent: it ends
    os.kill(os.getpid(), signal.SIGKILL)


class Fenced:
    """Calls in a process of their own, one at a time: a hang or a crash costs the call.

    The process is forked by the first call and lives on for the next ones. Only Linux forks safely; elsewhere the calls
    are made here, without a deadline.

    Args:
        deadline: seconds for a call.

    Raises:
        ValueError: if there is no time.
    """

    def __init__(self, deadline: float) -> None:
        if not deadline > 0:
            raise ValueError(f"got deadline {deadline}; expected more than 0 seconds.")
        self.deadline = deadline
        self.reset()
        _fences.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return Fenced, (self.deadline,)

    def reset(self) -> None:
        """Forgets the process: in a forked process it is another one's."""
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __call__(self, function: Callable[[Any], Any], item: Any) -> Any:
        """function(item).

        Raises:
            ValueError: that the function raised, or OSError; or because it took too long or ended its process.
            Exception: any other error of the function.
        """
        if sys.platform != "linux":
            return function(item)
        with self._lock:
            reply = self._ask(function, item)
        if isinstance(reply, Failure):
            raise ValueError(reply.reason)
        if isinstance(reply, Raised):
            raise reply.error
        return reply

    def _ask(self, function: Callable[[Any], Any], item: Any) -> Any:
        child, self._child = self._child or _Child(), None
        why = ""
        try:
            child.connection.send((function, item))
            if child.connection.poll(self.deadline):
                reply = child.connection.recv()
                self._child = child
                return reply
            why = f"took longer than {self.deadline:g} s"
        except (EOFError, OSError):
            pass  # it has ended
        finally:
            # Also after Ctrl-C: the next call must not take the answer of this one.
            code = None if self._child else child.end()
        assert code is not None
        return Failure(why or why_it_ended(code))


_fences: "weakref.WeakSet[Fenced]" = weakref.WeakSet()


def _reset_all() -> None:
    for fence in list(_fences):
        fence.reset()


os.register_at_fork(after_in_child=_reset_all)
