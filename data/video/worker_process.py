"""The child's side of `data.video.workers`: takes items from a pipe and answers them."""

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
    """What came of an item instead of a result.

    Args:
        reason: in words.
    """

    reason: str


@dataclass
class Raised:
    """An error that is not the item's fault."""

    error: BaseException


def serve(connection: Connection) -> None:
    """A worker: says that it is ready, then answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    connection.send(None)
    answer(connection)


def answer(connection: Connection) -> None:
    """Answers each (function, item) that comes with its result, until the other side is closed."""
    while True:
        try:
            function, item = connection.recv()
            reply = _attempt(function, item)
        except EOFError:
            return
        except Exception as error:  # a function that cannot be imported here
            reply = Raised(error)
        try:
            connection.send(reply)
        except OSError:
            return
        except Exception as error:  # a result that cannot travel
            connection.send(Raised(TypeError(f"{type(reply).__name__} cannot be sent to another process: {error}")))


def _attempt(function: Callable[[Any], Any], item: Any) -> Any:
    try:
        return function(item)
    except (ValueError, OSError) as error:
        return Failure(str(error) or type(error).__name__)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)).rstrip())  # tracebacks do not travel
        return Raised(error)


def _end_with_parent() -> None:
    # The parent of this process is the fork server, which outlives ours while this process runs.
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def why_it_ended(code: int) -> str:
    """What an exit code says, negative for a signal."""
    if code == -signal.SIGKILL:
        return "its process was killed (signal 9; out of memory?)"
    return f"the decoder crashed (signal {-code})" if code < 0 else f"its process ended by itself (exit status {code})"
