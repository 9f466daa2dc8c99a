"""The first step of packing: probes every clip of a source and writes the journal."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from data.pack.entries import ClipEntry
from data.pack.journal import CHUNK, ClipJournal
from data.pack.probe_clip import JournalLine, ProbeSettings, fault_line, probe_clip
from data.pack.sources import ClipSource
from data.shards.format import Fault, check_fault_share
from data.video.worker_pool import Failure, WorkerPool

#: Advice if there are too many faults. The journal describes one source, so a mended source needs another folder.
FAULT_ADVICE = "Raise max_fault_share to go on without them; or mend or remove them and pack into another folder."


@dataclass
class FaultLimit:
    """Stops packing if too many clips are faulty.

    Args:
        journal: `faults.jsonl` is written beside its folder.
        where: name of the source in messages.
        clips: number of clips of the source.
        share: of the clips that may be faulty, 0 to 1.
    """

    journal: ClipJournal
    where: str
    clips: int
    share: float

    def check(self, faults: Sequence[Fault]) -> None:
        """Compares the number of faults with the limit.

        Raises:
            ValueError: if there are too many; `faults.jsonl` then lists them.
        """
        listing = self.journal.folder.parent / "faults.jsonl"
        check_fault_share(faults, self.clips, self.share, self.where, FAULT_ADVICE, listing)


def probe_source(
    source: ClipSource,
    journal: ClipJournal,
    settings: ProbeSettings,
    limit: FaultLimit,
    *,
    processes: int,
    deadline: float,
) -> Iterator[int]:
    """Probes the clips that have no line in the journal yet. Yields how many clips are done since the last value.

    Args:
        source: of the clips.
        journal: to write.
        settings: for each clip.
        limit: of faults.
        processes: number of workers.
        deadline: seconds for each clip.

    Raises:
        ValueError: if too many clips are faulty, or the source lists another number of clips than before.
    """
    faults: list[Fault] = []
    in_order: deque[tuple[int, ClipEntry, bool]] = deque()  # (chunk, entry, whether it is the last of its chunk)
    reused: deque[int] = deque()  # sizes of chunks that an earlier run has finished
    listed = 0

    def unprobed() -> Iterator[ClipEntry]:
        nonlocal listed
        entries = source.entries()
        chunk = 0
        while part := list(islice(entries, CHUNK)):
            listed += len(part)
            if (lines := journal.read_chunk(chunk)) is not None:
                faults.extend(faults_of(lines))
                reused.append(len(part))
            else:
                for index, entry in enumerate(part):
                    in_order.append((chunk, entry, index + 1 == len(part)))
                    yield entry
            chunk += 1

    lines: list[JournalLine] = []
    with WorkerPool(processes, deadline) as pool:
        # Lines are small, so many may wait: one slow clip should not delay the others.
        for result in pool.map(partial(probe_clip, settings=settings), unprobed(), ahead=32 * processes):
            chunk, entry, last = in_order.popleft()
            line = fault_line(entry, result.reason) if isinstance(result, Failure) else result
            lines.append(line)
            faults.extend(faults_of([line]))
            if last:
                journal.write_chunk(chunk, lines)
                lines.clear()
            limit.check(faults)
            yield 1 + _take_all(reused)
    yield _take_all(reused)
    limit.check(faults)
    if listed != limit.clips:
        raise ValueError(f"the source listed {limit.clips} clips and then {listed}; expected one that does not change.")
    journal.finish(limit.clips)


def faults_of(lines: Sequence[dict[str, Any]]) -> list[Fault]:
    """The faults among lines of the journal."""
    return [Fault(line["key"], line["fault"], line["shard"]) for line in lines if "fault" in line]


def _take_all(counts: deque[int]) -> int:
    return sum(counts.popleft() for _ in range(len(counts)))
