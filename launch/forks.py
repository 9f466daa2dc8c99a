"""Loader processes are forked from a rank that has other threads; an old fault of Python can stop them for ever."""

import os
import sys
import time

#: Seconds in which a collective's thread comes to rest after the collective.
_REST = 0.05


def rest_before_forks() -> None:
    """Lets the threads of past collectives come to rest before each fork, where Python needs that.

    Before 3.11.10, a process that is forked while another thread makes its thread state waits for ever for the lock
    which that thread held (https://github.com/python/cpython/issues/112275). Threads of gloo do so when they drop a
    tensor at the end of a collective: right before the next epoch's loader processes are forked.
    """
    if sys.version_info < (3, 11, 10):
        os.register_at_fork(before=lambda: time.sleep(_REST))
