"""The queue of shards that several processes encode into one folder."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.encode.clip_batches import ShardTask, open_shard
from data.encode.leases import Leases
from data.encode.output_folder import SETTINGS
from data.families import MOCHI
from data.files import temporaries
from data.shards.folder import ShardFolder
from data.shards.format import Fault, check_fault_share, record_name
from data.storage.store import Store
from data.stream.shard_index import IndexedShards, sample_count

_GOLDEN_RATIO = 0.6180339887498949


def lease_name(shard: str) -> str:
    """File name of the lease on a shard."""
    return shard.removesuffix(".tar") + ".json"


def start_position(count: int, environment: Mapping[str, str] = os.environ) -> int:
    """Where in a list of `count` shards this process begins, so that processes rarely compete for a shard.

    It depends on the process's number within its job: SLURM array task and rank, else the process id.
    """

    def number(*names: str) -> int | None:
        return next((int(environment[name]) for name in names if environment.get(name, "").isdigit()), None)

    task, rank = number("SLURM_ARRAY_TASK_ID"), number("RANK", "SLURM_PROCID")
    ranks = number("WORLD_SIZE", "SLURM_NTASKS") or 1
    process = os.getpid() if task is None and rank is None else (task or 0) * ranks + (rank or 0)
    # Multiples of the golden ratio, modulo 1, are evenly spread for any number of processes.
    return int(count * (process * _GOLDEN_RATIO % 1.0))


class ShardQueue:
    """Which shards are finished, by this or another process, and which this process may encode.

    Args:
        folder: of the latent shards.
        sources: the video shards.
        store: reads the video shards.
        leases: of this process.
        max_fault_share: of all clips.
        family: that the clips are encoded for.

    Raises:
        ValueError: if two sources hold shards of one name, whose latents would overwrite each other.
    """

    def __init__(
        self,
        folder: ShardFolder,
        sources: Sequence[IndexedShards],
        store: Store,
        leases: Leases,
        max_fault_share: float,
        family: str = MOCHI.name,
    ) -> None:
        self.folder, self.sources, self.store, self.leases = folder, sources, store, leases
        self.max_fault_share, self.family = max_fault_share, family
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._source_folders: dict[str, str] = {}  # by shard name
        for source in sources:
            for entry in source.index["shards"]:
                name = entry["name"]
                if name in self.entries:
                    raise ValueError(
                        f"{self._source_folders[name]} and {source.folder} both hold a shard {name}, and one folder of "
                        "latents cannot. Encode each into a folder of its own; `fit` takes several."
                    )
                self.entries[name], self._source_folders[name] = entry, source.folder
        self.total_samples = sample_count(sources)
        self.faults: dict[str, list[Fault]] = {}  # of finished shards
        self._unfinished_faults: dict[str, list[Fault]] = {}  # of shards that this process encodes now
        names = list(self.entries)
        first = start_position(len(names))
        self.unfinished = names[first:] + names[:first]

    @property
    def finished_samples(self) -> int:
        """Number of clips in the finished shards."""
        return self.total_samples - sum(self.entries[name]["samples"] for name in self.unfinished)

    def refresh(self) -> list[str]:
        """Removes shards that are finished by now from the queue, and returns their names.

        Raises:
            ValueError: if one was made with other settings, or too many clips are faulty.
        """
        found = [name for name in self.unfinished if self._note_finished(name, self.folder.finished(name))]
        self.unfinished = [name for name in self.unfinished if name not in self.faults]
        self.check_faults()
        return found

    def _note_finished(self, name: str, record: Mapping[str, Any] | None) -> bool:
        if record is not None:
            self.faults[name] = [Fault(**fault) for fault in record["faults"]]
        return record is not None

    def acquire_shards(self) -> Iterator[ShardTask]:
        """Unfinished shards that no other process encodes. Each is leased when it is yielded; this never waits."""
        for name in list(self.unfinished):
            if self._note_finished(name, self.folder.finished(name)) or not self.leases.acquire(lease_name(name)):
                continue
            # Its last owner may have finished it just before it released the lease.
            if self._note_finished(name, self.folder.finished(name)):
                self.leases.release(lease_name(name))
                continue
            self._remove_leftovers(name)
            yield open_shard(self._source_folders[name], self.entries[name], self.store, self.family)

    def owns(self, task: ShardTask) -> bool:
        """Whether this process still owns the lease on a shard."""
        return self.leases.owns(lease_name(task.name))

    def end_task(self, task: ShardTask, record: Mapping[str, Any] | None) -> None:
        """Releases a shard.

        Args:
            task: the shard.
            record: of the finished shard; None if it was dropped.
        """
        self._note_finished(task.name, record)
        self._unfinished_faults.pop(task.name, None)
        self.leases.release(lease_name(task.name))

    def add_faults(self, task: ShardTask, faults: Sequence[Fault]) -> None:
        """Counts faults of a shard that is not finished.

        Raises:
            ValueError: if too many clips are faulty; a later run encodes the unfinished shard again.
        """
        if faults:
            self._unfinished_faults.setdefault(task.name, []).extend(faults)
            self.check_faults()

    def check_faults(self) -> None:
        """Compares the number of faults so far with that of all clips.

        Raises:
            ValueError: if there are too many.
        """
        known = {**self._unfinished_faults, **self.faults}
        faults = [fault for name in self.entries for fault in known.get(name, [])]
        where, listing = ", ".join(s.folder for s in self.sources), self.folder.folder / "faults.jsonl"
        check_fault_share(faults, self.total_samples, self.max_fault_share, where, listing=listing)

    def write_index(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the index, which begins with `head`, and removes what killed processes left."""
        index = self.folder.finish(list(self.entries), head)
        assert index is not None, "every shard is finished"
        for name in self.entries:
            self._remove_leftovers(name)
        for path in temporaries(self.folder.folder):
            if self.leases.is_stale(path):  # another process may be writing the same index
                path.unlink(missing_ok=True)
        self.leases.remove([SETTINGS, *(lease_name(name) for name in self.entries)])
        return index

    def describe_owners(self) -> list[str]:
        """A line for each unfinished shard: which process encodes it."""
        owners = {name: self.leases.describe_owner(lease_name(name)) for name in self.unfinished}
        return [f"{name}: {owner or 'nobody holds it now'}" for name, owner in owners.items()]

    def _remove_leftovers(self, name: str) -> None:
        """Removes temporary files that killed processes left of a shard that this process owns now."""
        for path in (self.folder.folder / name, self.folder.folder / record_name(name)):
            for temporary in temporaries(path.parent, path.name):
                temporary.unlink(missing_ok=True)
