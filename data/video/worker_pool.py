"""A pool of processes for items that may hang or crash a process: clips from any origin.

Each worker has a pipe of its own, so a worker that dies in the middle of a message disturbs no other worker. With the
standard library's pools, which share a queue, it ends the whole pool or leaves it waiting.
"""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from data.video.worker_process import Failure, RaisedError, describe_exit, run_pool_worker

#: Modules that the fork server imports once, so that no worker imports them again.
_PRELOADED = ["data.video.decode", "data.video.scene_cuts", "data.video.trim", "data.encode.clip_batches"]
#: The pool gives up after so many workers in a row that end before they are ready.
_START_ATTEMPTS = 3

__all__ = ["Failure", "WorkerPool"]

_context = multiprocessing.get_context("forkserver")


class WorkerPool:
    """A pool of processes; an item that hangs or crashes its process costs that item, never the run.

    The processes are forked from a server that has neither threads nor an accelerator. They end when the iteration
    that feeds them ends, when this object's context ends, and when this process ends, however it ends.

    Args:
        processes: number of workers.
        deadline: seconds per item, counted from when a worker starts on it.

    Raises:
        ValueError: if `processes` is below 1 or `deadline` is not positive.
    """

    def __init__(self, processes: int, deadline: float) -> None:
        if processes < 1 or not deadline > 0:
            raise ValueError(f"got processes {processes}, deadline {deadline}; expected at least 1, and more than 0 s.")
        self.processes, self.deadline = processes, deadline
        self._runs: list[_MapRun] = []
        _context.set_forkserver_preload(_PRELOADED)

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *_: object) -> None:
        for run in self._runs:
            run.stop()

    def map(
        self, function: Callable[[Any], Any], items: Iterable[Any], ahead: int | None = None
    ) -> Iterator[Any | Failure]:
        """function(item) for each item, in the order of the items.

        If the function raises ValueError or OSError, exceeds the deadline or ends its process, the result is a
        `Failure`. When the iteration ends early, by an error, `break` or Ctrl-C, the workers are killed.

        Args:
            function: takes an item; it must be importable by name. Items and results are pickled.
            items: a thread of the pool iterates over them, not the caller's thread.
            ahead: most items that are taken but whose results are not yet yielded; None is twice the processes.

        Raises:
            ValueError: if `ahead` is below 1.
            Exception: any other error of the function or of `items`, after the results before it are yielded.
        """
        ahead = 2 * self.processes if ahead is None else ahead
        if ahead < 1:
            raise ValueError(f"got ahead {ahead}; expected at least 1.")
        run = _MapRun(self.processes, self.deadline, function, iter(items), ahead)
        self._runs.append(run)
        return self._results(run)

    def _results(self, run: "_MapRun") -> Iterator[Any | Failure]:
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
    index: int | None = None  # of its current item
    due: float = 0.0  # when that item has to be done, by time.monotonic()

    def end(self, grace_period: float) -> int:
        """Kills the process if it runs longer than `grace_period` seconds; its exit code, negative for a signal."""
        self.process.join(grace_period)
        self.process.kill()
        self.process.join()
        code = self.process.exitcode
        self.process.close()
        self.connection.close()
        return code


class _MapRun:
    """One call of `map`: a thread sends items to the workers and collects results, which the caller's thread yields."""

    def __init__(
        self, processes: int, deadline: float, function: Callable[[Any], Any], items: Iterator[Any], ahead: int
    ) -> None:
        self.processes, self.deadline, self.ahead = processes, deadline, ahead
        self.function, self.items = function, items
        self.workers: list[_Worker] = []
        self.results_by_index: dict[int, Any] = {}
        self.taken_items = self.yielded_results = 0
        self.exhausted = self.stopped = False
        self.error: BaseException | None = None  # of the thread itself
        self.unsent: tuple[int, Any] | None = None  # an item that was taken but not sent to a worker yet
        self.failed_starts = 0
        self.changed = threading.Condition()
        self.wake_receiver, self.wake_sender = multiprocessing.Pipe(duplex=False)  # wakes the thread from `wait`
        self.thread = threading.Thread(target=self._run, name="worker-pool", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Kills the workers at once, in whatever state they and the thread are."""
        with self.changed:
            self.stopped = True
            for worker in self.workers:
                with contextlib.suppress(ValueError):  # it has ended
                    worker.process.kill()
        self._wake()
        if self.thread.is_alive():
            self.thread.join(timeout=1)  # it may be waiting for an item, which cannot be interrupted

    def results(self) -> Iterator[Any]:
        while True:
            with self.changed:
                self.changed.wait_for(self._can_yield_or_end)
                if self.yielded_results not in self.results_by_index:
                    if self.error is not None:
                        raise self.error
                    if self.yielded_results != self.taken_items or not self.exhausted:
                        raise RuntimeError("the pool was closed before all its items were done.")
                    return
                result = self.results_by_index.pop(self.yielded_results)
                self.yielded_results += 1
            self._wake()
            if isinstance(result, RaisedError):
                raise result.error
            yield result

    def _can_yield_or_end(self) -> bool:
        finished = self.exhausted and self.yielded_results == self.taken_items
        return self.yielded_results in self.results_by_index or finished or self.stopped or self.error is not None

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # the thread has ended
            self.wake_sender.send_bytes(b"!")

    def _run(self) -> None:
        try:
            while not self.stopped and not self._finished():
                if not self._send_item():
                    self._collect()
        except BaseException as error:  # the caller's thread raises it
            with self.changed:
                self.error = error
                self.changed.notify_all()
        finally:
            for worker in self.workers:
                worker.process.kill()
                worker.end(grace_period=0)
            self.wake_receiver.close()

    def _finished(self) -> bool:
        return self.exhausted and self.unsent is None and all(worker.index is None for worker in self.workers)

    def _send_item(self) -> bool:
        """Sends an item to an idle worker; False if too many results wait, or there is no item or no idle worker."""
        if self.unsent is None and (self.exhausted or self.taken_items - self.yielded_results >= self.ahead):
            return False
        while len(self.workers) < self.processes:
            self._start_worker()
        worker = next((worker for worker in self.workers if worker.ready and worker.index is None), None)
        if worker is None or self.unsent is None and not self._take_item():
            return False
        index, item = self.unsent or (0, None)
        try:
            worker.connection.send((self.function, item))
            worker.index, worker.due = index, time.monotonic() + self.deadline
        except OSError:  # the worker was killed while it was idle; the next one gets the item
            self._remove(worker)
            return True
        except Exception as error:  # the item cannot be pickled
            self._finish(index, RaisedError(error))
        self.unsent = None
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
            self.taken_items += 1
            self.exhausted = True
            self._finish(self.taken_items - 1, RaisedError(error))
            return False
        self.unsent = (self.taken_items, item)
        self.taken_items += 1
        return True

    def _start_worker(self) -> None:
        connection, workers_end = multiprocessing.Pipe()
        process = _context.Process(target=run_pool_worker, args=(workers_end,), daemon=True)
        with self.changed:  # so that `stop` sees it
            if not self.stopped:
                process.start()
                self.workers.append(_Worker(process, connection))
        workers_end.close()

    def _collect(self) -> None:
        """Waits until a worker sends a result, passes its deadline or ends, or until a result is yielded."""
        dues = [worker.due for worker in self.workers if worker.index is not None]
        timeout = max(min(dues) - time.monotonic(), 0) if dues else None
        ready = wait(
            [self.wake_receiver, *(w.connection for w in self.workers), *(w.process.sentinel for w in self.workers)],
            timeout,
        )
        if self.wake_receiver in ready:
            self.wake_receiver.recv_bytes()
        for worker in list(self.workers):
            # A result that has arrived is used, even if it is late or the worker has ended since.
            if worker.connection.poll():
                self._receive(worker)
            elif worker.process.sentinel in ready:
                self._remove(worker)
            elif worker.index is not None and time.monotonic() > worker.due:
                self._remove(worker, f"took longer than {self.deadline:g} s")

    def _receive(self, worker: _Worker) -> None:
        try:
            reply = worker.connection.recv()
        except (EOFError, OSError):
            self._remove(worker)
            return
        except Exception as error:  # the reply cannot be unpickled here
            reply = RaisedError(error)
        if not worker.ready:
            worker.ready, self.failed_starts = True, 0
        elif worker.index is not None:
            index, worker.index = worker.index, None
            self._finish(index, reply)

    def _remove(self, worker: _Worker, reason: str = "") -> None:
        """Ends a worker; its current item fails."""
        with self.changed:
            self.workers.remove(worker)
        code = worker.end(grace_period=0 if reason else 5)
        if worker.index is not None:
            self._finish(worker.index, Failure(reason or describe_exit(code)))
        elif not worker.ready:
            self.failed_starts += 1
            if self.failed_starts >= _START_ATTEMPTS:
                raise RuntimeError(
                    f"worker processes do not start ({describe_exit(code)}); their own messages are above."
                )

    def _finish(self, index: int, result: Any) -> None:
        with self.changed:
            self.results_by_index[index] = result
            self.changed.notify_all()
