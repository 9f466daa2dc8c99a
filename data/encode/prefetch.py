"""An iterator that computes its values ahead of its consumer."""

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from typing import Any, TypeVar

T = TypeVar("T")


def prefetch(source: Iterator[T], depth: int) -> Generator[T, None, None]:
    """Yields the values of `source`, which a thread computes up to `depth` ahead; errors of `source` propagate.

    The thread starts with this call. Closing the returned generator stops the thread and closes `source`.
    """
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(message: tuple[bool, Any]) -> bool:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(message, timeout=0.1)
                return True
        return False

    def fill_queue() -> None:
        try:
            with contextlib.closing(source):  # type: ignore[type-var]
                for value in source:
                    if not put((True, value)):
                        return
            put((False, None))
        except BaseException as error:  # the consumer's thread raises it
            put((False, error))

    thread = threading.Thread(target=fill_queue, name="prefetch", daemon=True)
    thread.start()

    def values() -> Generator[T, None, None]:
        try:
            while True:
                more, value = ready.get()
                if more:
                    yield value
                elif value is not None:
                    raise value
                else:
                    return
        finally:
            stop.set()
            # The thread may wait for a clip that hangs; that wait ends when the pool of decoders closes.
            thread.join(timeout=1.0)

    return values()
