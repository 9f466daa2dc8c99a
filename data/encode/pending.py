"""What is left to encode, seen by one of several processes that share a folder."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.encode.claims import Claims, start_position
from data.encode.decoding import Work, open_shard
from data.encode.output_folder import SETTINGS
from data.files import temporaries
from data.shards.folder import ShardFolder
from data.shards.format import Fault, check_fault_share, record_name
from data.storage.store import Store
from data.stream.shard_index import Source, sample_count


def claim_name(shard: str) -> str:
    """What the claim on a shard is called."""
    return shard.removesuffix(".tar") + ".json"


class Pending:
    """Which shards are finished, by whomever, and what is to be done.

    Args:
        folder: of the latent shards.
        sources: the video shards.
        store: that reads them.
        claims: of this process.
        max_fault_share: of all clips.

    Raises:
        ValueError: if two folders hold shards of one name: their latents could not lie in one folder.
    """

    def __init__(
        self,
        folder: ShardFolder,
        sources: Sequence[Source],
        store: Store,
        claims: Claims,
        max_fault_share: float,
    ) -> None:
        self.folder, self.sources, self.store, self.claims = folder, sources, store, claims
        self.max_fault_share = max_fault_share
        self.entries: dict[str, Mapping[str, Any]] = {}
        self._places: dict[str, str] = {}  # name -> folder
        for source in sources:
            for entry in source.index["shards"]:
                name = entry["name"]
                if name in self.entries:
                    raise ValueError(
                        f"{self._places[name]} and {source.folder} both hold a shard {name}, and one folder of latents "
                        "cannot. Encode each into a folder of its own; `fit` takes several."
                    )
                self.entries[name], self._places[name] = entry, source.folder
        self.total = sample_count(sources)
        self.faults: dict[str, list[Fault]] = {}  # of finished shards
        self._open: dict[str, list[Fault]] = {}  # of shards that this process is at
        names = list(self.entries)
        first = start_position(len(names))
        self.pending = names[first:] + names[:first]

    @property
    def finished_samples(self) -> int:
        """Clips of the video shards that are finished."""
        return self.total - sum(self.entries[name]["samples"] for name in self.pending)

    def survey(self) -> list[str]:
        """Looks which pending shards are finished by now.

        Raises:
            ValueError: if one was made with other settings, or too much is faulty.
        """
        found = [name for name in self.pending if self._note(name, self.folder.finished(name))]
        self.pending = [name for name in self.pending if name not in self.faults]
        self.check_faults()
        return found

    def _note(self, name: str, record: Mapping[str, Any] | None) -> bool:
        if record is not None:
            self.faults[name] = [Fault(**fault) for fault in record["faults"]]
        return record is not None

    def claimed(self) -> Iterator[Work]:
        """Pending shards that nobody else works on, claimed as they are drawn. Never waits."""
        for name in list(self.pending):
            if self._note(name, self.folder.finished(name)) or not self.claims.take(claim_name(name)):
                continue
            # Its last owner may have finished it just before it let go.
            if self._note(name, self.folder.finished(name)):
                self.claims.release(claim_name(name))
                continue
            self._clear(name)
            yield open_shard(self._places[name], self.entries[name], self.store)

    def holds(self, work: Work) -> bool:
        """Whether the shard is still this process's to finish."""
        return self.claims.holds(claim_name(work.name))

    def done(self, work: Work, record: Mapping[str, Any] | None) -> None:
        """Takes note of a shard that is in place, or was given up."""
        self._note(work.name, record)
        self._open.pop(work.name, None)
        self.claims.release(claim_name(work.name))

    def count(self, work: Work, faults: Sequence[Fault]) -> None:
        """Counts faults of a shard that is not finished.

        Raises:
            ValueError: if too much is faulty; a shard that is not finished then will be made again.
        """
        if faults:
            self._open.setdefault(work.name, []).extend(faults)
            self.check_faults()

    def check_faults(self) -> None:
        """Sets the faults of everything so far against all clips.

        Raises:
            ValueError: if they are too many.
        """
        known = {**self._open, **self.faults}
        faults = [fault for name in self.entries for fault in known.get(name, [])]
        where, listing = ", ".join(s.folder for s in self.sources), self.folder.folder / "faults.jsonl"
        check_fault_share(faults, self.total, self.max_fault_share, where, listing=listing)

    def finish(self, head: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the index, of which `head` is the beginning, and removes what killed processes left."""
        index = self.folder.finish(list(self.entries), head)
        assert index is not None, "every shard is finished"
        for name in self.entries:
            self._clear(name)
        for part in temporaries(self.folder.folder):
            if self.claims.is_old(part):  # another process may be writing the same index
                part.unlink(missing_ok=True)
        self.claims.clear([SETTINGS, *(claim_name(name) for name in self.entries)])
        return index

    def holders(self) -> list[str]:
        """A line on each pending shard: who holds it."""
        return [f"{name}: {self.claims.holder(claim_name(name)) or 'nobody holds it now'}" for name in self.pending]

    def _clear(self, name: str) -> None:
        """Removes what killed processes left of a shard that is this process's now."""
        for path in (self.folder.folder / name, self.folder.folder / record_name(name)):
            for part in temporaries(path.parent, path.name):
                part.unlink(missing_ok=True)
