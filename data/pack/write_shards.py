"""The third step of packing: writes the planned shards, several at once."""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass

from data.pack.journal import ClipJournal
from data.pack.plan import PackPlan
from data.pack.probe_source import FaultLimit
from data.pack.samples import SampleMaker
from data.shards.folder import ShardFolder
from data.shards.format import Fault
from data.storage.store import Store
from data.video.worker_pool import WorkerPool


@dataclass
class PlannedShardsWriter:
    """Writes the shards of a plan that are not finished yet.

    Args:
        folder: of the shards.
        journal: of the clips.
        plan: of the shards.
        store: reads the clips.
        fps: of the windows; None for each clip's own.
        reencode: whether to encode the windows.
        processes: number of shards written at once.
        deadline: seconds for each clip.
    """

    folder: ShardFolder
    journal: ClipJournal
    plan: PackPlan
    store: Store
    fps: float | None
    reencode: bool
    processes: int
    deadline: float

    def run(self, faults: Sequence[Fault], limit: FaultLimit, advance: Callable[[int], None]) -> int:
        """Writes the shards.

        Args:
            faults: of the clips that came into no shard.
            limit: of `faults` and those of the shards together.
            advance: called with the number of samples that are done.

        Returns:
            Number of faults of the shards.

        Raises:
            ValueError: if too many clips are faulty, or finished shards have other settings.
        """
        shard_faults: list[Fault] = []
        missing = []
        for name, (_, samples) in self.plan.shards.items():
            if record := self.folder.finished(name):
                shard_faults += [Fault(**fault) for fault in record["faults"]]
                advance(len(samples))
            else:
                missing.append(name)
        if finished := len(self.plan.shards) - len(missing):
            total = len(self.plan.shards)
            print(f"{self.folder.folder}: {finished} of {total} shards are finished already and are kept")
        with closing(self._write_all(missing, advance)) as finished_shards:
            for faults_of_shard in finished_shards:
                shard_faults += faults_of_shard
                limit.check([*faults, *shard_faults])
        limit.check([*faults, *shard_faults])
        return len(shard_faults)

    def _write_all(self, names: Sequence[str], advance: Callable[[int], None]) -> Generator[list[Fault], None, None]:
        """Writes shards in threads, and yields the faults of each when it is finished. Closing it stops the threads."""
        stop, of_thread = threading.Event(), threading.local()
        with ExitStack() as stack, ThreadPoolExecutor(self.processes) as threads:

            def write(name: str) -> list[Fault]:
                if not hasattr(of_thread, "maker"):
                    # Each thread has a worker of its own, which starts with the first window that has to be cut.
                    pool = stack.enter_context(WorkerPool(1, self.deadline))
                    of_thread.maker = SampleMaker(self.journal, self.store, pool, self.fps, self.reencode)
                return self._write_shard(name, of_thread.maker, stop, advance)

            try:
                for done in as_completed([threads.submit(write, name) for name in names]):
                    yield done.result()
            except BaseException:
                stop.set()
                threads.shutdown(wait=True, cancel_futures=True)
                raise

    def _write_shard(
        self, name: str, maker: SampleMaker, stop: threading.Event, advance: Callable[[int], None]
    ) -> list[Fault]:
        bucket, planned = self.plan.shards[name]
        faults: list[Fault] = []

        def samples() -> Iterator[dict[str, bytes | str]]:
            for sample in maker.samples(bucket, planned, faults):
                if stop.is_set():
                    raise InterruptedError("another shard failed")
                advance(1)
                if sample is not None:
                    yield sample

        self.folder.write(name, bucket, samples(), faults)
        return faults
