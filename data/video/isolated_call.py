"""One process for calls that may hang or crash, for use inside the processes of a `DataLoader`.

`data.video.worker_pool` cannot serve there: loader processes are daemons, and `multiprocessing` lets a daemon start no
process. So this module forks with `os.fork`. It runs one call at a time, because each loader process has its own.
"""

import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from data.safe_fork import fork
from data.video.worker_process import Failure, RaisedError, describe_exit, prepare, serve_calls


class _Child:
    """A forked process that serves calls. It ends when this process ends."""

    def __init__(self) -> None:
        self.connection, childs_end = multiprocessing.Pipe()
        # Nothing is sent through the second pipe: it closes when this process ends.
        parent_exit, self._parent_lives = multiprocessing.Pipe(duplex=False)
        self._pid = fork()
        if self._pid == 0:
            try:
                self.connection.close()
                self._parent_lives.close()
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                prepare(parent_exit)
                serve_calls(childs_end)
            finally:
                os._exit(0)  # the parent's cleanup handlers must not run here
        childs_end.close()
        parent_exit.close()

    def end(self) -> int:
        """Kills the process if it still runs; returns its exit code, negative for a signal."""
        self.connection.close()  # a process that waits for calls ends by itself
        self._parent_lives.close()
        os.kill(self._pid, signal.SIGKILL)  # until `waitpid`, no other process can have its id
        return os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])


class IsolatedCall:
    """Runs calls in a process of their own, one at a time: a hang or a crash costs only that call.

    The first call forks the process, later calls reuse it. Only Linux forks safely; on other systems the calls run in
    this process, without a deadline.

    Args:
        deadline: seconds for a call.

    Raises:
        ValueError: if the deadline is not positive.
    """

    def __init__(self, deadline: float) -> None:
        if not deadline > 0:
            raise ValueError(f"got deadline {deadline}; expected more than 0 seconds.")
        self.deadline = deadline
        self.reset()
        _instances.add(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return IsolatedCall, (self.deadline,)

    def reset(self) -> None:
        """Forgets the process. A forked copy of this object must not use the process of its parent."""
        self._lock = threading.Lock()
        self._child: _Child | None = None

    def __call__(self, function: Callable[[Any], Any], item: Any) -> Any:
        """function(item).

        Raises:
            ValueError: if the function raises ValueError or OSError, takes longer than the deadline, or ends its
                process.
            Exception: any other error of the function.
        """
        if sys.platform != "linux":
            return function(item)
        with self._lock:
            reply = self._request(function, item)
        if isinstance(reply, Failure):
            raise ValueError(reply.reason)
        if isinstance(reply, RaisedError):
            raise reply.error
        return reply

    def _request(self, function: Callable[[Any], Any], item: Any) -> Any:
        child, self._child = self._child or _Child(), None
        reason = ""
        try:
            child.connection.send((function, item))
            if child.connection.poll(self.deadline):
                reply = child.connection.recv()
                self._child = child
                return reply
            reason = f"took longer than {self.deadline:g} s"
        except (EOFError, OSError):
            pass  # the process has ended
        finally:
            # Also after Ctrl-C: the next call must not receive the result of this one.
            code = None if self._child else child.end()
        assert code is not None
        return Failure(reason or describe_exit(code))


_instances: "weakref.WeakSet[IsolatedCall]" = weakref.WeakSet()


def _reset_all() -> None:
    for instance in list(_instances):
        instance.reset()


os.register_at_fork(after_in_child=_reset_all)
