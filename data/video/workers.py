"""Work on items that may hang or crash a process: decoding clips of any origin.

Each worker process has a pipe of its own, so that nothing that one does, or that is done to it, reaches another.
"""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from data.video.worker_process import Failure, Raised, serve, why_it_ended

#: Loaded once, in the process from which the workers are forked.
_PRELOADED = ["data.video.clip_files", "data.video.scene_cuts", "data.video.trim", "data.encode.decoding"]
#: Workers that end before they are ready, one after another, until it is given up.
_START_ATTEMPTS = 3

__all__ = ["Failure", "Guarded"]

_context = multiprocessing.get_context("forkserver")


class Guarded:
    """A pool of processes for items that may hang or crash: that costs the item, never the run.

    The processes are forked from a server that holds neither threads nor an accelerator. They end with the iteration
    that feeds them, with this object, and with this process, however it ends.

    Args:
        processes: how many work at once.
        deadline: seconds per item, counted from when a process starts on it.

    Raises:
        ValueError: if there is no process or no time.
    """

    def __init__(self, processes: int, deadline: float) -> None:
        if processes < 1 or not deadline > 0:
            raise ValueError(f"got processes {processes}, deadline {deadline}; expected at least 1, and more than 0 s.")
        self.processes, self.deadline = processes, deadline
        self._runs: list[_Run] = []
        _context.set_forkserver_preload(_PRELOADED)

    def __enter__(self) -> "Guarded":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.stop()

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], ahead: int | None = None
    ) -> Iterator[Any | Failure]:
        """function(item) for each item, in the order of the items.

        A ValueError or OSError of the function, a deadline that passes and the end of the process become a `Failure`.
        When the iteration is left, by an error, `break` or Ctrl-C, the items under way are killed.

        Args:
            function: importable by name; takes an item. Items and results travel between processes.
            items: taken by another thread than the one that takes the results.
            ahead: items taken and not yet handed on at any time; None is twice the processes.

        Raises:
            ValueError: if `ahead` is below 1.
            Exception: any other error of the function or of `items`, once the results before it are handed on.
        """
        ahead = 2 * self.processes if ahead is None else ahead
        if ahead < 1:
            raise ValueError(f"got ahead {ahead}; expected at least 1.")
        run = _Run(self.processes, self.deadline, function, iter(items), ahead)
        self._runs.append(run)
        return self._results(run)

    def _results(self, run: "_Run") -> Iterator[Any | Failure]:
        run.start()
        try:
            yield from run.results()
        finally:
            run.stop()
            self._runs.remove(run)


@dataclass(eq=False)
class _Worker:
    process: Any
    connection: Connection
    ready: bool = False
    index: int | None = None  # of the item it works on
    due: float = 0.0  # when that has to be done, by time.monotonic()

    def end(self, patience: float) -> int:
        """Its exit code, negative for a signal; it is killed if it lives on for `patience` seconds."""
        self.process.join(patience)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.connection.close()
        return code


class _Run:
    """One iteration: a thread feeds the workers and collects their results, the caller's thread takes them."""

    def __init__(
        self, processes: int, deadline: float, function: Callable[[Any], Any], items: Iterator[Any], ahead: int
    ) -> None:
        self.processes, self.deadline, self.ahead = processes, deadline, ahead
        self.function, self.items = function, items
        self.workers: list[_Worker] = []
        self.done: dict[int, Any] = {}  # results by the index of their item
        self.given = self.taken = 0  # items that were given to workers, results that were taken
        self.exhausted = self.stopped = False
        self.error: BaseException | None = None  # of the thread itself
        self.held: tuple[int, Any] | None = None  # an item that no worker has yet
        self.false_starts = 0
        self.changed = threading.Condition()
        self.awake, self.alarm = multiprocessing.Pipe(duplex=False)  # wakes the thread
        self.thread = threading.Thread(target=self._work, name="guarded", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Kills the processes at once, whatever they and the thread are at."""
        with self.changed:
            self.stopped = True
            for worker in self.workers:
                with contextlib.suppress(ValueError):  # it has ended
                    worker.process.kill()
        self._wake()
        if self.thread.is_alive():
            self.thread.join(timeout=1)  # it may be waiting for an item, which nothing can end

    def results(self) -> Iterator[Any]:
        while True:
            with self.changed:
                self.changed.wait_for(self._can_go_on)
                if self.taken not in self.done:
                    if self.error is not None:
                        raise self.error
                    if self.taken != self.given or not self.exhausted:
                        raise RuntimeError("the pool was closed before all its items were done.")
                    return
                result = self.done.pop(self.taken)
                self.taken += 1
            self._wake()
            if isinstance(result, Raised):
                raise result.error
            yield result

    def _can_go_on(self) -> bool:
        finished = self.exhausted and self.taken == self.given
        return self.taken in self.done or finished or self.stopped or self.error is not None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the thread has ended
            self.alarm.send_bytes(b"!")

    def _work(self) -> None:
        try:
            while not self.stopped and not self._finished():
                if not self._give():
                    self._collect()
        except BaseException as error:  # the caller's thread raises it
            with self.changed:
                self.error = error
                self.changed.notify_all()
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.end(patience=0)
            self.awake.close()

    def _finished(self) -> bool:
        return self.exhausted and self.held is None and all(worker.index is None for worker in self.workers)

    def _give(self) -> bool:
        """Gives an item to a worker that is idle; False if there is no room, no item or no such worker."""
        if self.held is None and (self.exhausted or self.given - self.taken >= self.ahead):
            return False
        while len(self.workers) < self.processes:
            self._start_worker()
        worker = next((worker for worker in self.workers if worker.ready and worker.index is None), None)
        if worker is None or self.held is None and not self._take_item():
            return False
        index, item = self.held or (0, None)
        try:
            worker.connection.send((self.function, item))
            worker.index, worker.due = index, time.monotonic() + self.deadline
        except OSError:  # it was killed while it was idle; the item goes to the next
            self._lose(worker)
            return True
        except Exception as error:  # what cannot be sent
            self._finish(index, Raised(error))
        self.held = None
        return True

    def _take_item(self) -> bool:
        try:
            item = next(self.items)
        except StopIteration:
            with self.changed:
                self.exhausted = True
                self.changed.notify_all()
            return False
        except Exception as error:
            self.given += 1
            self.exhausted = True
            self._finish(self.given - 1, Raised(error))
            return False
        self.held = (self.given, item)
        self.given += 1
        return True

    def _start_worker(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        process = _context.Process(target=serve, args=(theirs,), daemon=True)
        with self.changed:  # so that `stop` sees it
            if not self.stopped:
                process.start()
                self.workers.append(_Worker(process, ours))
        theirs.close()

    def _collect(self) -> None:
        """Waits until a worker has something to say, is late or has ended, or until a result was taken."""
        dues = [worker.due for worker in self.workers if worker.index is not None]
        patience = max(min(dues) - time.monotonic(), 0) if dues else None
        heard = wait(
            [self.awake, *(w.connection for w in self.workers), *(w.process.sentinel for w in self.workers)], patience
        )
        if self.awake in heard:
            self.awake.recv_bytes()
        for worker in list(self.workers):
            # What has arrived counts, also if it is late or if the worker has ended since.
            if worker.connection.poll():
                self._receive(worker)
            elif worker.process.sentinel in heard:
                self._lose(worker)
            elif worker.index is not None and time.monotonic() > worker.due:
                self._lose(worker, f"took longer than {self.deadline:g} s")

    def _receive(self, worker: _Worker) -> None:
        try:
            reply = worker.connection.recv()
        except (EOFError, OSError):
            self._lose(worker)
            return
        except Exception as error:  # a reply that cannot be read here
            reply = Raised(error)
        if not worker.ready:
            worker.ready, self.false_starts = True, 0
        elif worker.index is not None:
            index, worker.index = worker.index, None
            self._finish(index, reply)

    def _lose(self, worker: _Worker, reason: str = "") -> None:
        """Ends a worker; what it was working on fails."""
        with self.changed:
            self.workers.remove(worker)
        code = worker.end(patience=0 if reason else 5)
        if worker.index is not None:
            self._finish(worker.index, Failure(reason or why_it_ended(code)))
        elif not worker.ready:
            self.false_starts += 1
            if self.false_starts >= _START_ATTEMPTS:
                raise RuntimeError(
                    f"worker processes do not start ({why_it_ended(code)}); their own messages are above."
                )

    def _finish(self, index: int, result: Any) -> None:
        with self.changed:
            self.done[index] = result
            self.changed.notify_all()
