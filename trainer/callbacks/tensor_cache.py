"""Caches of tensors: in memory up to a budget, and in a folder whose files are verified when read."""

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
    """Tensors, and values that JSON can represent.

    Args:
        tensors: tensors by name.
        facts: values by name.
        widened: names of the tensors that `narrow` has converted from float32 to bfloat16.
    """

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    widened: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    def to(self, device: torch.device | str) -> "CacheEntry":
        """The entry on `device`; each tensor is contiguous."""
        return replace(self, tensors={name: t.to(device).contiguous() for name, t in self.tensors.items()})

    def narrow(self) -> "CacheEntry":
        """Converts float32 tensors to bfloat16 if that is lossless, as for the output of a bfloat16 trunk."""
        tensors, widened = dict(self.tensors), []
        for name, tensor in self.tensors.items():
            if tensor.dtype == torch.float32:
                half = tensor.bfloat16()
                if torch.equal(half.float(), tensor):
                    tensors[name] = half
                    widened.append(name)
        return replace(self, tensors=tensors, widened=tuple(widened))

    def widen(self) -> "CacheEntry":
        """Reverses `narrow`."""
        wide = {name: t.float() if name in self.widened else t for name, t in self.tensors.items()}
        return replace(self, tensors=wide, widened=())


class MemoryCache:
    """Cache in memory. It takes entries until the budget is used up, and evicts none.

    Args:
        budget: largest size of all entries in bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._entries: dict[str, CacheEntry] = {}

    @property
    def nbytes(self) -> int:
        """Size of all entries in bytes."""
        return sum(entry.nbytes for entry in self._entries.values())

    def fits(self, entry: CacheEntry) -> bool:
        """Whether the entry fits into the remaining budget."""
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
    """Cache in a folder that several processes may share: one safetensors file per key, none of them evicted.

    A file is used only if its metadata match the key and the digest of its tensors; otherwise it is written again. If
    a write fails, the cache warns once and then stops writing.

    Args:
        path: folder of the cache; it is created at the first write.
        budget: number of bytes that this process may write.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._left = budget

    def _file(self, key: str) -> Path:
        return self._path / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def fits(self, entry: CacheEntry) -> bool:
        """Whether the entry fits into the remaining budget."""
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
