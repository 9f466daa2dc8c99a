"""Caches the frozen trunk's output on the probes in host memory, and optionally in a folder.

Legend: B probes of a batch, N vision tokens, L text tokens, D width.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch import Tensor

from trainer.callbacks.probe_set import ProbeBatch
from trainer.callbacks.tensor_cache import CacheEntry, DiskCache, MemoryCache
from trainer.models.layout import AttentionFunction, TokenLayout
from trainer.models.state import State
from trainer.versions import package_versions, source_digest

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

GIB = 2**30


@dataclass(frozen=True)
class TrunkForward:
    """One forward pass of the trunk: its attention functions and what they measure.

    Args:
        functions: attention function by layer; functions of the head's layers are ignored.
        changes: how `functions` change the trunk's output, with all settings; empty if they do not change it.
        measures: what `functions` measure, with all settings; empty if they measure nothing.
        found: measured tensors by name; empty before the pass, then filled by `functions` or from the cache.
    """

    functions: Mapping[int, AttentionFunction] = field(default_factory=dict)
    changes: str = ""
    measures: str = ""
    found: dict[str, Tensor] = field(default_factory=dict)


class TrunkCache(Callback):
    """Caches the trunk's results on each probe batch: the input of the first retrained block, and measurements.

    The trunk is frozen and the probes are fixed, so these results are the same at all stages, and for all callbacks,
    scopes and ratios. A cached result equals a computed one bit for bit. What does not fit is computed at every use.
    There is no eviction: batches come in the same order at every stage, so an LRU cache would miss every time. The
    cache is not part of checkpoints.

    If a recipe lists a `TrunkCache` among its callbacks, all measurements of the run use it; otherwise they share one
    with these defaults. The cache's keys cover only the functions of a `TrunkForward`, so no other change of the
    trunk's attention may be active during a measurement.

    Args:
        host_gib: host memory for the cache in GiB, per process. At Mochi's full length a probe takes 0.26 GiB from a
            bfloat16 trunk, and the rotary tables 0.51 GiB once.
        folder: folder to cache in too, for a resumed run or another run on the same base and probes.
        disk_gib: limit for writes to `folder` in GiB, per process. Files are never removed.
    """

    def __init__(self, *, host_gib: float = 5.0, folder: str | None = None, disk_gib: float = 64.0) -> None:
        if not (host_gib >= 0 and disk_gib >= 0):
            raise ValueError(f"got host_gib={host_gib}, disk_gib={disk_gib}, expected sizes in GiB, 0 or more.")
        self._memory = MemoryCache(int(host_gib * GIB))
        self._folder = None if folder is None else DiskCache(Path(folder), int(disk_gib * GIB))
        self._sharded = False
        self._run_passes = self._cached_passes = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        replicated = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        self._sharded = not replicated or isinstance(trainer.strategy, DeepSpeedStrategy)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._memory.clear()

    @property
    def host_bytes(self) -> int:
        """Limit of host memory in bytes."""
        return self._memory.budget

    @property
    def counts(self) -> tuple[int, int]:
        """Number of trunk passes so far that were run, and that came from the cache."""
        return self._run_passes, self._cached_passes

    def state(self, module: "RetrainBlocks", probes: ProbeBatch, forward: TrunkForward | None = None) -> State:
        """Returns the input of block `module.first` and fills `forward.found`; runs the trunk if either is not cached.

        Args:
            module: module that owns the trunk.
            probes: probe batch on the module's device.
            forward: attention functions of the pass; None runs it without changes and measurements.
        """
        how = forward or TrunkForward()
        functions = {layer: function for layer, function in how.functions.items() if layer < module.first}
        # Sharded weights need all ranks for each forward pass, but a cache may hit on some ranks only. And a model
        # without a frozen trunk has nothing to cache.
        if self._sharded or module.first == 0:
            return self._run(module, probes, functions)
        device = probes.noise.device
        trunk = _identity(module, device)
        probe = trunk | {"probes": probes.identity, "changes": how.changes if functions else ""}
        names = {"rope": trunk | {"grid": probes.noise.shape[2:]}, "state": probe | {"part": "state"}}
        if functions and how.measures:
            names["found"] = probe | {"part": how.measures}
        keys = {part: json.dumps(name, sort_keys=True) for part, name in names.items()}
        cached = {part: entry for part, key in keys.items() if (entry := self._get(key, device)) is not None}
        if len(cached) == len(keys):
            self._cached_passes += 1
            if "found" in cached:
                how.found.update(cached["found"].tensors)
            return _join(cached["state"], cached["rope"])
        state = self._run(module, probes, functions)
        made = dict(zip(("state", "rope"), _split(state), strict=True)) | {"found": CacheEntry(how.found)}
        for part in keys:
            if part not in cached:
                self._put(keys[part], made[part])
        return state

    def _run(self, module: "RetrainBlocks", probes: ProbeBatch, functions: Mapping[int, AttentionFunction]) -> State:
        self._run_passes += 1
        x = module.process.mix(probes.batch.latents, probes.noise, probes.sigma)
        if not functions:
            return module.trunk(x, probes.sigma, probes.batch)
        with module.split_model.attention(functions):
            return module.trunk(x, probes.sigma, probes.batch)

    def _get(self, key: str, device: torch.device) -> CacheEntry | None:
        entry = self._memory.get(key)
        if entry is None and self._folder is not None:
            entry = self._folder.get(key)
            if entry is not None:
                self._memory.put(key, entry)
        return None if entry is None else entry.to(device).widen()

    def _put(self, key: str, made: CacheEntry) -> None:
        made = made.narrow()
        levels = [level for level in (self._memory, self._folder) if level is not None and level.fits(made)]
        if levels:  # otherwise nothing needs to be copied from the device
            made = made.to("cpu")
        for level in levels:
            level.put(key, made)


def _split(state: State) -> tuple[CacheEntry, CacheEntry]:
    """Splits a state into the tensors of these probes, and the rotary tables, which all probes of one size share."""
    own = {"vision": state.vision, "text": state.text, "temb": state.temb}
    if state.out_temb is not None:
        own["out_temb"] = state.out_temb
    if state.layout.key_mask is not None:
        own["key_mask"] = state.layout.key_mask
    layout = state.layout
    facts = {"grid": layout.grid, "lengths": layout.text_lengths, "tokens": layout.text_tokens, "size": state.size}
    return CacheEntry(own, facts), CacheEntry({str(index): table for index, table in enumerate(state.rope)})


def _join(own: CacheEntry, rope: CacheEntry) -> State:
    """Reverses `_split`."""
    tensors, facts = own.tensors, own.facts
    layout = TokenLayout(
        grid=tuple(facts["grid"]),
        text_lengths=tuple(facts["lengths"]),
        text_tokens=facts["tokens"],
        key_mask=tensors.get("key_mask"),
    )
    return State(
        vision=tensors["vision"],
        text=tensors["text"],
        temb=tensors["temb"],
        rope=tuple(rope.tensors[str(index)] for index in range(len(rope.tensors))),
        layout=layout,
        size=tuple(facts["size"]),
        out_temb=tensors.get("out_temb"),
    )


def _identity(module: "RetrainBlocks", device: torch.device) -> dict[str, Any]:
    """Everything that the trunk's output depends on besides the probes: weights, precision, hardware, code.

    The fingerprint covers the names of the frozen weights, so it also depends on the block at which the trunk ends.
    """
    kind = device.type
    if kind == "cuda":
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{kind} {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads"
    narrow = str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "off"
    return {
        "weights": module.base_fingerprint,
        "precision": [narrow, str(module.trunk_dtype), str(torch.get_default_dtype())],
        "matmul": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "hardware": hardware,
        "code": _code(),
    }


@functools.cache
def _code() -> str:
    """Digest of the trainer's source, and the versions of the packages that it computes with."""
    return f"{source_digest('trainer')} {package_versions(('torch', 'diffusers'))}"
