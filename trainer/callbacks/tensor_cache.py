"""Tensors kept for later use: in memory up to so many bytes, and in a folder whose files are checked when read."""

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
    """Tensors, and what JSON can hold.

    Args:
        tensors: by name.
        facts: by name.
        widened: names of tensors that are bfloat16 here and were float32.
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
        """float32 tensors as bfloat16 where that loses nothing: what a bfloat16 trunk hands on is such a one."""
        found, widened = dict(self.tensors), []
        for name, tensor in self.tensors.items():
            if tensor.dtype == torch.float32:
                half = tensor.bfloat16()
                if torch.equal(half.float(), tensor):
                    found[name] = half
                    widened.append(name)
        return replace(self, tensors=found, widened=tuple(widened))

    def widen(self) -> "CacheEntry":
        """Undoes `narrow`."""
        wide = {name: t.float() if name in self.widened else t for name, t in self.tensors.items()}
        return replace(self, tensors=wide, widened=())


class MemoryCache:
    """Keeps what is put into it until its budget is used up.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._kept: dict[str, CacheEntry] = {}

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    def fits(self, kept: CacheEntry) -> bool:
        """Whether there is space left for it."""
        return self.nbytes + kept.nbytes <= self._budget

    def get(self, key: str) -> CacheEntry | None:
        """What was put under `key`, if it was kept."""
        return self._kept.get(key)

    def put(self, key: str, kept: CacheEntry) -> None:
        """Keeps it if it fits."""
        if self.fits(kept):
            self._kept[key] = kept

    def clear(self) -> None:
        """Keeps nothing any longer."""
        self._kept.clear()


class DiskCache:
    """The same in safetensors files, one per key, for several processes at once.

    A file counts only if it holds its whole key and its tensors' digest: a damaged or foreign one is as good as none,
    and is written anew. Nothing is removed. A folder that cannot be written is said once and then left alone.

    Args:
        path: the folder; made when first written to.
        budget: bytes that this process may write.
    """

    def __init__(self, path: Path, budget: int) -> None:
        self._path = path
        self._left = budget

    def _file(self, key: str) -> Path:
        return self._path / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"

    def fits(self, kept: CacheEntry) -> bool:
        """Whether there is space left for it."""
        return kept.nbytes <= self._left

    def get(self, key: str) -> CacheEntry | None:
        """What lies under `key`, if it is whole."""
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            log.warning("%s cannot be read (%s) and is made anew", path, error)
            return None
        if told.get("key") != key or told.get("digest") != fingerprint(tensors.items()):
            log.warning("%s does not hold what its name says and is made anew", path)
            return None
        return CacheEntry(tensors, json.loads(told["facts"]), tuple(json.loads(told["widened"])))

    def put(self, key: str, kept: CacheEntry) -> None:
        """Writes it if it fits."""
        if not self.fits(kept):
            return
        told = {
            "key": key,
            "digest": fingerprint(kept.tensors.items()),
            "facts": json.dumps(kept.facts),
            "widened": json.dumps(kept.widened),
        }
        try:
            write_bytes(self._file(key), save(dict(kept.tensors), told))
        except OSError as error:
            log.warning("%s cannot be written (%s): nothing more is kept there", self._path, error)
            self._left = -1
            return
        self._left -= kept.nbytes
