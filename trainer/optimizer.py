"""AdamW over the retrained parameters: groups, schedule, and gradients that are scaled, clipped or not finite."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler


@dataclass(kw_only=True)
class OptimConfig:
    """AdamW with a constant rate between a linear warmup and, as an option, a linear decay.

    Args:
        lr: learning rate after warmup.
        warmup_steps: optimiser steps over which the rate rises linearly.
        decay_steps: optimiser steps at the end of the run over which the rate falls linearly towards zero (the WSD
            schedule: warmup, stable, decay). A run that is extended afterwards has a new end.
        weight_decay: decoupled decay of matrices; norms, biases and modulation biases have none.
        betas: AdamW's two decay rates.
        eps: AdamW's epsilon.
        clip_norm: gradients are scaled down to this total norm; 0 turns clipping off.
        max_skipped_in_row: the run stops after so many non-finite steps in a row.
    """

    lr: float = 1e-4
    warmup_steps: int = 200
    decay_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float = 1.0
    max_skipped_in_row: int = 10

    def __post_init__(self) -> None:
        if self.decay_steps < 0:
            raise ValueError(f"got optim.decay_steps {self.decay_steps}, expected 0 or more.")


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


def learning_rate(optimizer: AdamW, optim: OptimConfig, run_steps: Callable[[], float]) -> LRScheduler:
    """The schedule of the learning rate, by optimiser step.

    In W warmup steps it rises from lr / W to lr. In the last D steps of the run it falls from lr to lr / D, so that
    each step still changes something; after them it would be zero.

    Args:
        optimizer: whose rate.
        optim: its settings.
        run_steps: gives the optimiser steps of the whole run. It is not called before the second step: until then, the
            training loader, which they depend on, may not be made.
    """
    warmup = max(1, optim.warmup_steps)
    if not optim.decay_steps:
        return LinearLR(optimizer, start_factor=1 / warmup, total_iters=warmup - 1)

    def share(step: int) -> float:
        risen = min(1.0, (step + 1) / warmup)
        return risen if step == 0 else risen * max(0.0, min(1.0, (run_steps() - step) / optim.decay_steps))

    return LambdaLR(optimizer, share)


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
