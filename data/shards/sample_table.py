"""Tables of the byte ranges of a shard's samples, cached for the shards that were read last."""

import contextlib
import gc
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

from data.shards.archive import Member, Members
from data.shards.format import read_samples
from data.storage.store import Store

#: Samples whose rows a process caches, about 100 bytes each.
_CACHED_ROWS = 1 << 19
_LOCK = threading.Lock()


class SampleTable:
    """Keys and members of a shard's samples, without a Python object for each."""

    def __init__(self, samples: Sequence[tuple[str, Members]]) -> None:
        self._keys = [key for key, _ in samples]
        self._extensions = sorted({extension for _, members in samples for extension in members})
        absent = Member(-1, -1)
        self._version = next((m.version for _, members in samples for m in members.values()), "")
        rows = [[members.get(e, absent) for e in self._extensions] for _, members in samples]
        self._ranges = np.array([[(m.offset, m.size) for m in row] for row in rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, row: int) -> tuple[str, Members]:
        ranges = zip(self._extensions, self._ranges[row].tolist(), strict=True)
        return self._keys[row], {e: Member(offset, size, self._version) for e, (offset, size) in ranges if size >= 0}


class TableCache:
    """The tables that were used last, up to a number of samples; safe for several threads."""

    def __init__(self) -> None:
        self._tables: OrderedDict[int, SampleTable] = OrderedDict()

    def read(self, shard: int, folder: str, name: str, store: Store) -> SampleTable:
        """The table of a shard, from its record if it is not cached.

        Args:
            shard: number of the shard.
            folder: of the shard.
            name: of its file.
            store: that reads the record.

        Raises:
            ValueError, OSError: as `read_samples`.
        """
        with _LOCK:
            if shard in self._tables:
                self._tables.move_to_end(shard)
                return self._tables[shard]
            with _no_collection():
                table = self._tables[shard] = SampleTable(read_samples(folder, name, store))
            while len(self._tables) > 1 and sum(map(len, self._tables.values())) > _CACHED_ROWS:
                self._tables.popitem(last=False)
            return table

    def key(self, shard: int, row: int) -> str | None:
        """The key of a sample; None if its table is not cached or has no such row."""
        table = self._tables.get(shard)
        return table[row][0] if table is not None and row < len(table) else None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Suspends garbage collection: a record's thousands of short-lived lists trigger it, and it visits all of torch."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
