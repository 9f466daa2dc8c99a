"""Caches of tensors: in memory up to a number of bytes, and in a folder whose files are verified when read."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from data.files import write_bytes
from trainer.surgery import fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CacheEntry:
    """Tensors, and values that JSON can hold.

    Args:
        tensors: name -> tensor.
        facts: name -> value.
        widened: names of tensors that `narrow` has turned from float32 into bfloat16.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    widened: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "CacheEntry":
        """The same on `device`, without views of larger tensors."""
        return replace(self, tensors={name: t.to(device).contiguous() for name, t in self.tensors.items()})

    def narrow(self) -> "CacheEntry":
        """float32 tensors as bfloat16 where no bit is lost, as in the output of a bfloat16 trunk."""
        tensors, widened = dict(self.tensors), []
        for name, tensor in self.tensors.items():
            if tensor.dtype == torch.float32:
                half = tensor.bfloat16()
                if torch.equal(half.float(), tensor):
                    tensors[name] = half
                    widened.append(name)
        return replace(self, tensors=tensors, widened=tuple(widened))

    def widen(self) -> "CacheEntry":
        """Undoes `narrow`."""
        wide = {name: t.float() if name in self.widened else t for name, t in self.tensors.items()}
        return replace(self, tensors=wide, widened=())


class MemoryCache:
    """Entries in memory, until the budget is used up; nothing is evicted.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: dict[str, CacheEntry] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self._entries.values())

    def fits(self, entry: CacheEntry) -> bool:
        """Whether the budget allows for it."""
        return self.nbytes + entry.nbytes <= self.budget

    def get(self, key: str) -> CacheEntry | None:
        """The entry under `key`, or None."""
        return self._entries.get(key)

    def put(self, key: str, entry: CacheEntry) -> None:
        """Adds an entry if it fits."""
        if self.fits(entry):
            self._entries[key] = entry

    def clear(self) -> None:
        """Removes all entries."""
        self._entries.clear()


class DiskCache:
    """Entries in safetensors files, one per key, which several processes may share; nothing is removed.

    A file is used only if it holds its full key and the digest of its tensors; a damaged or foreign one is written
    again. If a write fails, the cache warns once and then stops writing.

    Args:
        path: the folder; made at the first write.
        budget: bytes that this process may write.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._left = budget

    def _file(self, key: str) -> Path:
        return self._path / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def fits(self, entry: CacheEntry) -> bool:
        """Whether the budget allows for it."""
        return entry.nbytes <= self._left

    def get(self, key: str) -> CacheEntry | None:
        """The entry under `key`, or None if there is no file or it is damaged."""
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read (%s) and is made again", path, error)
            return None
        if metadata.get("key") != key or metadata.get("digest") != fingerprint(tensors.items()):
            log.warning("%s does not hold the entry of its name and is made again", path)
            return None
        return CacheEntry(tensors, json.loads(metadata["facts"]), tuple(json.loads(metadata["widened"])))

    def put(self, key: str, entry: CacheEntry) -> None:
        """Writes an entry if it fits."""
        if not self.fits(entry):
            return
        metadata = {
            "key": key,
            "digest": fingerprint(entry.tensors.items()),
            "facts": json.dumps(entry.facts),
            "widened": json.dumps(entry.widened),
        }
        try:
            write_bytes(self._file(key), save(dict(entry.tensors), metadata))
        except OSError as error:
            log.warning("%s cannot be written (%s): nothing more is cached there", self._path, error)
            self._left = -1
            return
        self._left -= entry.nbytes
