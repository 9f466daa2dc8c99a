"""Grafts: files with the retrained blocks only, which go back onto the base."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from data.base_folder import resolve_base
from data.files import atomic_file
from trainer.models.load import load_transformer, read_weights
from trainer.surgery import frozen_fingerprint


@dataclass(frozen=True)
class Graft:
    """Retrained weights with what they belong to.

    Args:
        raw: name in the diffusers transformer -> weight after the last step.
        ema: the same names -> averaged weight.
        blocks: retrained block indices.
        base: the base as the recipe named it.
        base_fingerprint: SHA-256 of the frozen weights they were trained with.
        step: optimiser steps taken.
        trunk_dtype: dtype that the frozen trunk had, which the fingerprint depends on.
    """

    raw: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    blocks: tuple[int, ...]
    base: str
    base_fingerprint: str
    step: int
    trunk_dtype: str = "float32"


def save_graft(path: Path, graft: Graft) -> None:
    """Writes a graft as safetensors, atomically."""
    tensors = {f"raw.{name}": value for name, value in graft.raw.items()}
    tensors |= {f"ema.{name}": value for name, value in graft.ema.items()}
    metadata = {
        "format": "reblock-graft-1",
        "blocks": json.dumps(list(graft.blocks)),
        "base": graft.base,
        "base_fingerprint": graft.base_fingerprint,
        "step": str(graft.step),
        "trunk_dtype": graft.trunk_dtype,
    }
    with atomic_file(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=metadata)


def load_graft(path: Path) -> Graft:
    """Reads a graft.

    Raises:
        ValueError: if the file is missing or not a graft.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected the graft.safetensors that `reblock fit` leaves in a run.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or truncated ({error}). Copy it again, or take the run's last checkpoint."
        ) from error
    if metadata.get("format") != "reblock-graft-1":
        raise ValueError(f"{path} is not a graft (format {metadata.get('format')!r}, expected 'reblock-graft-1').")

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    return Graft(
        raw=part("raw."),
        ema=part("ema."),
        blocks=tuple(json.loads(metadata["blocks"])),
        base=metadata["base"],
        base_fingerprint=metadata["base_fingerprint"],
        step=int(metadata["step"]),
        trunk_dtype=metadata["trunk_dtype"],
    )


def check_graft_base(graft: Graft, base: Path) -> None:
    """Checks by the fingerprint of the weights that were not trained that a graft was trained on a base.

    Raises:
        ValueError: if it was trained on another.
    """
    model = load_transformer(str(base), dtype=getattr(torch, graft.trunk_dtype), float32_from=graft.blocks[0])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in graft.raw)
    found, expected = frozen_fingerprint(model), graft.base_fingerprint
    if found != expected:
        raise ValueError(
            f"the graft was trained on a base with fingerprint {expected[:16]}..., {base} has {found[:16]}...; "
            "give its own base with --base."
        )


@torch.no_grad()
def apply_graft(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a diffusers transformer by name.

    Raises:
        ValueError: if a name is unknown or a shape differs; nothing has been copied then.
    """
    own = dict(model.named_parameters())
    for name, value in weights.items():
        if name not in own or own[name].shape != value.shape:
            got = "no such parameter" if name not in own else f"shape {tuple(own[name].shape)}"
            raise ValueError(
                f"the graft's {name} {tuple(value.shape)} does not fit the base ({got}); use its own base."
            )
    for name, value in weights.items():
        own[name].copy_(value)


def base_block_weights(
    base: str,
    names: Mapping[str, object],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The base's own weights of `names`, read from its files without loading the rest.

    Args:
        base: what `resolve_base` takes; a `config.json` gives the random weights of `seed`.
        names: parameter names in the diffusers transformer.
        seed: of random weights, which also depend on the `dtype` and `device` they were made in.
        dtype: of random weights.
        device: of random weights.
    """
    if resolve_base(base).is_dir():
        return read_weights(base, names.keys())
    model = load_transformer(base, seed=seed, dtype=dtype, device=device)
    return {name: p.detach() for name, p in model.named_parameters() if name in names}
