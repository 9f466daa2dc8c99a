"""Which blocks are retrained, their fresh weights, what is frozen, and the fingerprint of the frozen weights."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from trainer.models.from_scratch import reserve_channels
from trainer.models.planted_record import read_planted
from trainer.models.planted_sinks import hold_sinks, parse_heads
from trainer.models.split_model import SplitModel
from trainer.parallel.sharded_tensors import full_tensor

Initialisation = Literal["dit", "torch", "normal", "keep"]


@dataclass(kw_only=True)
class SurgeryConfig:
    """Which blocks are retrained, and what they start from.

    Args:
        last: retrain the last so many blocks.
        blocks: or an explicit list of block indices.
        init: `dit` (Xavier, zero modulation: a new block starts as the identity), `torch` (each layer's default),
            `normal` (std 0.02) or `keep` (fine-tuning without re-initialisation, the control).
        seed: of the fresh weights.
        train_outside: also train the weights outside the blocks; only for making a base. Unless `init` is `keep`,
            Mochi's `pos_frequencies`, which diffusers sets to zero, are drawn from the seed; they are not trained.
        reserved_channels: (constant, marker), two residual channels that no trained layer reads or writes, so that
            sinks can be planted in them later.
        held_sinks: heads, as LAYER:HEAD, whose sinks (planted by `reblock plant`) are not trained; set
            `reserved_channels` too, to the base's own.
    """

    last: int | None = None
    blocks: list[int] | None = None
    init: Initialisation = "dit"
    seed: int = 0
    train_outside: bool = False
    reserved_channels: tuple[int, ...] = ()
    held_sinks: list[str] = field(default_factory=list)


def check_held(surgery: SurgeryConfig, weight_decay: float) -> None:
    """Checks that nothing changes the heads that `held_sinks` names.

    Held weights get no gradient, but weight decay would still change them.

    Raises:
        ValueError: if weight decay or re-initialisation would change them.
    """
    if not surgery.held_sinks:
        return
    if weight_decay:
        raise ValueError(
            f"got optim.weight_decay {weight_decay:g} with surgery.held_sinks {surgery.held_sinks}, expected 0: decay "
            "would change the held heads too."
        )
    if surgery.init != "keep":
        raise ValueError(
            f"got surgery.init {surgery.init!r} with held_sinks {surgery.held_sinks}, expected 'keep': a new "
            "block holds no planted sink."
        )


def check_planted(surgery: SurgeryConfig, base: str) -> None:
    """Checks that the sinks which `held_sinks` names are those that were planted in the base.

    Raises:
        ValueError: if the base has no planted sinks, or has others, or they read other channels.
    """
    if not surgery.held_sinks:
        return
    record = read_planted(base)
    if record is None:
        raise ValueError(
            f"got surgery.held_sinks {surgery.held_sinks} for {base}, which has no planted.json; expected a base that "
            "`reblock plant` wrote."
        )
    planted = [(entry["layer"], entry["head"]) for entry in record["heads"]]
    held = parse_heads(surgery.held_sinks)
    if len(set(held)) < len(held) or not set(held) <= set(planted):
        raise ValueError(
            f"got surgery.held_sinks {surgery.held_sinks}, expected heads that are planted in {base}, each once: "
            f"{', '.join(f'{layer}:{head}' for layer, head in planted)}."
        )
    channels = record.get("channels") or {}
    if list(surgery.reserved_channels) != [channels.get("constant"), channels.get("marker")]:
        raise ValueError(
            f"got surgery.reserved_channels {list(surgery.reserved_channels)} with held_sinks, expected those that the "
            f"planted heads of {base} read: [{channels.get('constant')}, {channels.get('marker')}]."
        )


def choose_blocks(num_blocks: int, *, last: int | None = None, blocks: Iterable[int] | None = None) -> tuple[int, ...]:
    """Block indices to retrain, sorted.

    Args:
        num_blocks: blocks of the model.
        last: the last so many.
        blocks: or an explicit list.

    Raises:
        ValueError: if both or neither are given, if the list is empty, or if an index is repeated or out of range.
    """
    if (last is None) == (blocks is None):
        raise ValueError(f"got last={last} and blocks={blocks}, expected exactly one of the two.")
    if last is not None:
        if not 1 <= last <= num_blocks:
            raise ValueError(f"got last={last}, expected 1 .. {num_blocks}: the model has {num_blocks} blocks.")
        return tuple(range(num_blocks - last, num_blocks))
    chosen = list(blocks or [])
    faults = []
    if not chosen:
        faults.append("the list is empty")
    if len(set(chosen)) != len(chosen):
        faults.append(f"repeated: {sorted({b for b in chosen if chosen.count(b) > 1})}")
    outside = sorted({b for b in chosen if not 0 <= b < num_blocks})
    if outside:
        faults.append(f"out of range: {outside}")
    if faults:
        raise ValueError(
            f"got blocks={chosen} ({'; '.join(faults)}), expected distinct indices in 0 .. {num_blocks - 1}."
        )
    return tuple(sorted(chosen))


def _dit(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.xavier_uniform_(layer.weight, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _torch_default(layer: nn.Linear, generator: torch.Generator) -> None:
    # nn.Linear.reset_parameters takes no generator; these are its two lines.
    nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
    if layer.bias is not None:
        bound = layer.in_features**-0.5
        nn.init.uniform_(layer.bias, -bound, bound, generator=generator)


def _normal(layer: nn.Linear, generator: torch.Generator) -> None:
    nn.init.normal_(layer.weight, std=0.02, generator=generator)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


_INITIALISERS: dict[str, Callable[[nn.Linear, torch.Generator], None]] = {
    "dit": _dit,
    "torch": _torch_default,
    "normal": _normal,
}


@torch.no_grad()
def reinitialise(block: nn.Module, kind: Initialisation, seed: int, family: type[SplitModel]) -> None:
    """Gives a block fresh weights; norm weights (QK-norm among them) become one.

    Under `dit` the layers that the family names are zero, so that the block starts as the identity. Values are drawn on
    the CPU in float32 from `seed`, so that they are the same on every device and dtype.

    Raises:
        ValueError: if a parameter belongs to neither a linear layer nor a norm, and the family does not name it: it
            would keep the base's value unseen.
    """
    if kind == "keep":
        return
    if kind not in _INITIALISERS:
        raise ValueError(f"got initialisation {kind!r}, expected one of {sorted([*_INITIALISERS, 'keep'])}.")
    generator = torch.Generator().manual_seed(seed)
    done: set[str] = set()
    for name, module in block.named_modules():
        own = {f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Linear):
            fresh = nn.utils.skip_init(  # a plain nn.Linear would draw from torch's global generator
                nn.Linear, module.in_features, module.out_features, bias=module.bias is not None, dtype=torch.float32
            )
            if kind == "dit" and family.starts_at_zero(block, name):
                _zero(fresh)
            else:
                _INITIALISERS[kind](fresh, generator)
            for key, value in fresh.named_parameters():
                getattr(module, key).copy_(value)
        elif own and "norm" in type(module).__name__.lower():
            for key, value in module.named_parameters(recurse=False):
                value.fill_(0.0 if key == "bias" else 1.0)
        elif own:
            continue
        done |= own
    for name, draw in family.fresh_parameters(block).items():
        block.get_parameter(name).copy_(draw(generator))
        done.add(name)
    missed = {name for name, _ in block.named_parameters()} - done
    if missed:
        raise ValueError(
            f"no initialisation is known for {sorted(missed)}; expected linear layers, norms, and what the family "
            f"{family.family} names."
        )


def apply_surgery(split_model: SplitModel, blocks: Sequence[int], config: SurgeryConfig) -> None:
    """Re-initialises `blocks` in place, and freezes everything that is not retrained.

    Args:
        split_model: the base; on the meta device no weight is drawn.
        blocks: what `choose_blocks` gave.
        config: how the blocks start, and what else is trained.
    """
    model = split_model.transformer
    meta = model.device.type == "meta"
    for index in blocks:
        if not meta:
            reinitialise(split_model.blocks[index], config.init, config.seed * 1000 + index, type(split_model))
    freeze_all_but(model, [model] if config.train_outside else [split_model.blocks[i] for i in blocks])
    for name in split_model.never_trained:
        model.get_parameter(name).requires_grad_(False)
    if config.train_outside and config.init != "keep" and not meta:
        split_model.draw_positions(config.seed)
    if config.held_sinks:
        hold_sinks(model, config.reserved_channels, parse_heads(config.held_sinks))
    elif config.reserved_channels:
        reserve_channels(model, config.reserved_channels)


def freeze_all_but(model: nn.Module, trainable: Iterable[nn.Module]) -> None:
    """Turns gradients off everywhere, then on inside `trainable`."""
    model.requires_grad_(False)
    for module in trainable:
        module.requires_grad_(True)


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names; one tensor is on the host at a time.

    Sharded tensors give the same value as full ones. Then every rank that holds a part must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(named, key=lambda pair: pair[0]):
        tensor = full_tensor(tensor.detach())
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frozen_fingerprint(model: nn.Module) -> str:
    """Fingerprint of every parameter and buffer that is not trained."""
    frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
    return fingerprint([*frozen, *model.named_buffers()])
