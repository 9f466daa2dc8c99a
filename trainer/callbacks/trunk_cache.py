"""What the frozen trunk makes of the probes, kept for the run: in memory, then in a folder, else computed again.

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
from trainer.models.mochi import State
from trainer.versions import package_versions, source_digest

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

GIB = 2**30


@dataclass(frozen=True)
class TrunkForward:
    """How the trunk is run, and what is measured in it.

    Args:
        functions: attention functions by layer; those of the head are no part of it.
        changes: names what `functions` do to the pass, all settings included; empty: they leave it as it is.
        measures: names what `functions` find, all settings included; empty: nothing.
        found: where they put it, tensors by name, empty before; filled from the store where the pass is not run.
    """

    functions: Mapping[int, AttentionFunction] = field(default_factory=dict)
    changes: str = ""
    measures: str = ""
    found: dict[str, Tensor] = field(default_factory=dict)


class TrunkCache(Callback):
    """Keeps what the trunk makes of a probe batch: the state that enters the first retrained block, and measurements.

    The trunk is frozen and the probes are fixed, so both are the same at all stages, for all callbacks, scopes and
    ratios; from the store they are the same bit for bit. What does not fit is computed at every use. Nothing is turned
    out for something else: batches come in one order at every stage, and a store of the latest would always have lost
    the next. Nothing goes into checkpoints.

    Listed among a recipe's callbacks, it serves all measurements of the run; where none is listed, they share one with
    these defaults. It knows the functions that it is given, no others: measure inside no other change of the trunk's
    attention.

    Args:
        host_gib: memory for it in GiB, per process. At Mochi's full length a probe takes 0.26 GiB from a
            bfloat16 trunk, and the rotary tables 0.51 GiB once.
        folder: also keep it there, for a resumed run, or another one on the same base and probes; None: nowhere.
        disk_gib: what may be written to `folder` in GiB, per process. Nothing is removed from it.
    """

    def __init__(self, *, host_gib: float = 5.0, folder: str | None = None, disk_gib: float = 64.0) -> None:
        if not (host_gib >= 0 and disk_gib >= 0):
            raise ValueError(f"got host_gib={host_gib}, disk_gib={disk_gib}, expected sizes in GiB, 0 or more.")
        self._memory = MemoryCache(int(host_gib * GIB))
        self._folder = None if folder is None else DiskCache(Path(folder), int(disk_gib * GIB))
        self._sharded = False
        self._run_passes = self._kept_passes = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        whole = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        self._sharded = not whole or isinstance(trainer.strategy, DeepSpeedStrategy)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._memory.clear()

    @property
    def counts(self) -> tuple[int, int]:
        """Passes of the trunk so far: those that were run, and those whose outcome was kept."""
        return self._run_passes, self._kept_passes

    def state(self, module: "RetrainBlocks", probes: ProbeBatch, trunk_pass: TrunkForward | None = None) -> State:
        """What enters block `module.first`, and `trunk_pass.found` filled; runs the trunk where either is missing.

        Args:
            module: whose trunk.
            probes: on the module's device.
            trunk_pass: how it is run; None: as it is, nothing measured.
        """
        how = trunk_pass or TrunkForward()
        functions = {layer: function for layer, function in how.functions.items() if layer < module.first}
        # A sharded model computes only where all ranks do: none of them may have what another has not. And a model
        # without a frozen trunk leaves nothing to keep.
        if self._sharded or module.first == 0:
            return self._run(module, probes, functions)
        device = probes.noise.device
        trunk = _identity(module, device)
        probe = trunk | {"probes": probes.identity, "changes": how.changes if functions else ""}
        names = {"rope": trunk | {"grid": probes.noise.shape[2:]}, "state": probe | {"part": "state"}}
        if functions and how.measures:
            names["found"] = probe | {"part": how.measures}
        keys = {part: json.dumps(name, sort_keys=True) for part, name in names.items()}
        kept = {part: found for part, key in keys.items() if (found := self._get(key, device)) is not None}
        if len(kept) == len(keys):
            self._kept_passes += 1
            if "found" in kept:
                how.found.update(kept["found"].tensors)
            return _join(kept["state"], kept["rope"])
        state = self._run(module, probes, functions)
        made = dict(zip(("state", "rope"), _split(state), strict=True)) | {"found": CacheEntry(how.found)}
        for part in keys:
            if part not in kept:
                self._put(keys[part], made[part])
        return state

    def _run(self, module: "RetrainBlocks", probes: ProbeBatch, functions: Mapping[int, AttentionFunction]) -> State:
        self._run_passes += 1
        x = module.flow.mix(probes.batch.latents, probes.noise, probes.sigma)
        if not functions:
            return module.trunk(x, probes.sigma, probes.batch)
        with module.split_model.attention(functions):
            return module.trunk(x, probes.sigma, probes.batch)

    def _get(self, key: str, device: torch.device) -> CacheEntry | None:
        kept = self._memory.get(key)
        if kept is None and self._folder is not None:
            kept = self._folder.get(key)
            if kept is not None:
                self._memory.put(key, kept)
        return None if kept is None else kept.to(device).widen()

    def _put(self, key: str, made: CacheEntry) -> None:
        made = made.narrow()
        levels = [level for level in (self._memory, self._folder) if level is not None and level.fits(made)]
        if levels:  # else nothing is fetched from the device in vain
            made = made.to("cpu")
        for level in levels:
            level.put(key, made)


def _split(state: State) -> tuple[CacheEntry, CacheEntry]:
    """What is the probes' own, and the rotary tables, the same for all probes of one size."""
    own = {"vision": state.vision, "text": state.text, "temb": state.temb}
    if state.layout.key_mask is not None:
        own["key_mask"] = state.layout.key_mask
    layout = state.layout
    facts = {"grid": layout.grid, "lengths": layout.text_lengths, "tokens": layout.text_tokens, "size": state.size}
    return CacheEntry(own, facts), CacheEntry({"cos": state.rope[0], "sin": state.rope[1]})


def _join(own: CacheEntry, rope: CacheEntry) -> State:
    """Undoes `_split`."""
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
        rope=(rope.tensors["cos"], rope.tensors["sin"]),
        layout=layout,
        size=tuple(facts["size"]),
    )


def _identity(module: "RetrainBlocks", device: torch.device) -> dict[str, Any]:
    """All that decides the trunk's numbers besides the probes: weights, arithmetic, hardware, code.

    The fingerprint is one of names too, so that it also says where the trunk ends.
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
    """The trainer's source and the versions of what it computes with."""
    return f"{source_digest('trainer')} {package_versions(('torch', 'diffusers'))}"
