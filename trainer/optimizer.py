"""AdamW over the retrained parameters: groups, schedule, and gradients that are scaled, clipped or not finite."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a constant rate after a linear warmup.

    Args:
        lr: learning rate after warmup.
        warmup_steps: optimiser steps over which the rate rises linearly.
        weight_decay: decoupled decay of matrices; norms, biases and modulation biases have none.
        betas: AdamW's two decay rates.
        eps: AdamW's epsilon.
        clip_norm: gradients are scaled down to this total norm; 0 turns clipping off.
        max_skipped_in_row: the run stops after so many non-finite steps in a row.
    """

    lr: float = 1e-4
    warmup_steps: int = 200
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    max_skipped_in_row: int = 10


def adamw(named: Mapping[str, Tensor], optim: OptimConfig, *, fused: bool) -> AdamW:
    """AdamW with weight decay on matrices only.

    Args:
        named: name -> trained parameter.
        optim: its settings.
        fused: use torch's fused kernel.
    """
    decayed = [p for p in named.values() if p.ndim >= 2]
    plain = [p for p in named.values() if p.ndim < 2]
    return AdamW(
        [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        fused=fused,
    )


def linear_warmup(optimizer: AdamW, steps: int) -> LinearLR:
    """A rate that rises linearly, from 1 / `steps` of its value to the full value in `steps` optimiser steps."""
    steps = max(1, steps)
    return LinearLR(optimizer, start_factor=1 / steps, total_iters=steps - 1)


def scale_gradients(parameters: Iterable[Tensor], factor: float) -> None:
    """Multiplies the gradients of `parameters` by a number, in place."""
    for p in parameters:
        if p.grad is not None:
            p.grad.mul_(factor)


def clip_or_drop(parameters: Iterable[Tensor], norm: Tensor, clip_norm: float) -> bool:
    """Clips gradients to `clip_norm` (0: not at all), or drops all of them if their total norm is not finite.

    AdamW skips a parameter that has no gradient: neither its value nor its state changes.

    Args:
        parameters: whose gradients are clipped.
        norm: () total norm of all their gradients.
        clip_norm: gradients above this total norm are scaled down to it.

    Returns:
        Whether the step is taken.
    """
    parameters = list(parameters)
    if not torch.isfinite(norm):  # the only place where a step waits for the device
        for p in parameters:
            p.grad = None
        return False
    if clip_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return True
