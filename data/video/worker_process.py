"""The code that runs inside a worker process: it receives calls through a pipe and sends back their results.

`data.video.worker_pool` and `data.video.isolated_call` start such processes.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch


@dataclass(frozen=True)
class Failure:
    """The result of an item that could not be processed.

    Args:
        reason: for a message.
    """

    reason: str


@dataclass
class RaisedError:
    """An error that the item did not cause; the parent process raises it."""

    error: BaseException


def run_pool_worker(connection: Connection) -> None:
    """Main function of a pool's worker: sends None when it is ready, then serves calls."""
    # The parent of this process is the fork server, which outlives the pool's process as long as this process runs.
    parent = multiprocessing.parent_process()
    assert parent is not None
    prepare(parent.sentinel)
    connection.send(None)
    serve_calls(connection)


def prepare(parent_exit: int | Connection) -> None:
    """Sets up a worker process: it ignores Ctrl-C, computes in one thread, and ends with its parent.

    Args:
        parent_exit: becomes readable when the parent process ends.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_end_with_parent, args=(parent_exit,), daemon=True).start()
    torch.set_num_threads(1)


def serve_calls(connection: Connection) -> None:
    """Sends the result of each (function, item) that arrives, until the other side closes the pipe."""
    while True:
        try:
            function, item = connection.recv()
            reply = _call(function, item)
        except EOFError:
            return
        except Exception as error:  # the function cannot be imported here
            reply = RaisedError(error)
        try:
            connection.send(reply)
        except OSError:
            return
        except Exception as error:  # the result cannot be pickled
            connection.send(
                RaisedError(TypeError(f"{type(reply).__name__} cannot be sent to another process: {error}"))
            )


def _call(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except (ValueError, OSError) as error:
        return Failure(str(error) or type(error).__name__)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)).rstrip())  # pickling drops the traceback
        return RaisedError(error)


def _end_with_parent(parent_exit: int | Connection) -> None:
    wait([parent_exit])
    os.kill(os.getpid(), signal.SIGKILL)


def describe_exit(code: int) -> str:
    """What an exit code means for a reader; a negative one is a signal."""
    if code == -signal.SIGKILL:
        return "its process was killed (signal 9; out of memory?)"
    return f"the decoder crashed (signal {-code})" if code < 0 else f"its process ended by itself (exit status {code})"
