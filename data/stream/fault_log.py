"""Lists each damaged sample of a run once in `faults.jsonl`; too many of them, over all processes, stop the run."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from data.files import append_line
from data.shards.format import Fault, truncated_samples
from data.storage.store import Store
from data.stream.shard_index import IndexedShards

log = logging.getLogger(__name__)


class FaultLog:
    """The damaged samples that a run has found so far.

    With a path, the log is a file. All loader processes of a rank append to it, and a resumed run continues it. The
    files of the other ranks, `faults*.jsonl` in the same folder, count too. Without a path, each process counts alone.

    Args:
        total: number of samples in the run's data.
        limit: share of the samples that may be damaged, 0 to 1. One sample is always allowed, even in a small set.
        path: file of this rank; its folder is created at the first write.
    """

    def __init__(self, total: int, limit: float, path: Path | None = None) -> None:
        self.total = total
        self.limit = limit
        self.path = path
        self._known: set[tuple[str, str]] = set()
        self._bytes_read: dict[Path, int] = {}  # file -> bytes read so far

    def add(self, fault: Fault) -> None:
        """Writes a fault to the log unless the log has it already.

        Raises:
            ValueError: if more samples are damaged than the limit allows.
        """
        item = (fault.shard, fault.key)
        if self.path is None:
            self._known.add(item)
        else:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                self._read_new_lines()
                if item not in self._known:
                    append_line(self.path, fault.line().removesuffix("\n"))
                    self._known.add(item)
        if self.exceeded(len(self._known)):
            raise ValueError(
                f"{len(self._known)} of {self.total} samples are damaged, more than max_fault_share {self.limit} "
                f"allows; the last: {fault.shard}: {fault.key}: {fault.reason}. "
                + (f"All are in {self.path.parent}/faults*.jsonl. " if self.path else "")
                + "Find them with `reblock inspect --verify`, mend them, or raise data.max_fault_share."
            )

    def exceeded(self, count: int) -> bool:
        """Whether `count` damaged samples are more than the limit allows."""
        return count > max(1.0, self.limit * self.total)

    def _read_new_lines(self) -> None:
        """Reads the faults that other processes, other ranks and earlier starts of the run have written."""
        assert self.path is not None
        for path in self.path.parent.glob("faults*.jsonl"):
            with path.open("rb") as file:
                file.seek(self._bytes_read.get(path, 0))
                content = file.read()
            whole = content[: content.rfind(b"\n") + 1]
            self._bytes_read[path] = self._bytes_read.get(path, 0) + len(whole)
            for line in whole.splitlines():
                try:
                    found = json.loads(line)
                    self._known.add((found["shard"], found["key"]))
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a killed process left incomplete


def fault_file(folder: Path, rank: int) -> Path:
    """Path of a rank's file: `faults.jsonl` for rank 0, `faults-rank3.jsonl` for rank 3."""
    return folder / (f"faults-rank{rank}.jsonl" if rank else "faults.jsonl")


def check_truncation(folders: Sequence[IndexedShards], store: Store, faults: FaultLog) -> None:
    """Warns of samples that lie beyond the end of a truncated shard.

    Raises:
        ValueError: if there are more of them than the limit allows.
    """
    lost: list[Fault] = [fault for f in folders for fault in truncated_samples(f.folder, f.index, store)]
    if not lost:
        return
    shards = Counter(f"{fault.shard} ({fault.reason})" for fault in lost)
    named = "; ".join(f"{count} in {shard}" for shard, count in shards.most_common(5))
    if len(shards) > 5:
        named += f"; and {len(shards) - 5} more shards"
    if faults.exceeded(len(lost)):
        raise ValueError(
            f"{len(lost)} of {faults.total} samples cannot be read, more than max_fault_share {faults.limit} allows: "
            f"{named}. Copy or make these shards again, or raise data.max_fault_share."
        )
    log.warning("%d of %d samples cannot be read and will be passed over: %s", len(lost), faults.total, named)
