"""Waiting for a condition, with a time limit."""

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, message: str = "the condition is false") -> None:
    """Returns when `condition()` is true.

    Raises:
        AssertionError: if it is false for `seconds`; with `message`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{message} after {seconds:g} s"
        time.sleep(0.01)
