"""The engine as operators of torch, each with a fake implementation: a compiled model holds them without a graph break.

They take and give what the functions of the same names do, with tensors and plain values alone. Like those, they need
no gradients of their inputs and give none: nothing flows back through them, and a model that is trained may hold them.

Legend: B batch, N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trainer.attention import masking, quantile, statistics


def _float(backend: str | None) -> torch.dtype:
    """What a back end counts and sums in."""
    return torch.float64 if backend == "dense" else torch.float32


@torch.library.custom_op("reblock::row_statistics", mutates_args=())
def row_statistics(
    q: Tensor, k: Tensor, lengths: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`statistics.row_statistics`: log-sum-exp, largest weight and entropy of each row, (B, h, N) each."""
    found = statistics.row_statistics(q, k, lengths=lengths, backend=backend)
    return found.lse, found.maximum, found.entropy


@row_statistics.register_fake
def _(q: Tensor, k: Tensor, lengths: Tensor | None = None, backend: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
    shape, dtype = q.shape[:3], _float(backend)
    return q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)


@torch.library.custom_op("reblock::key_statistics", mutates_args=())
def key_statistics(
    q: Tensor, k: Tensor, eps: Sequence[float], lengths: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`statistics.key_statistics`: column sums (B, h, N), and counts of A > eps (B, h, E, N)."""
    mass, counts = statistics.key_statistics(q, k, eps=eps, lengths=lengths, backend=backend)
    return mass, counts


@key_statistics.register_fake
def _(
    q: Tensor, k: Tensor, eps: Sequence[float], lengths: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    batch, heads, keys = *q.shape[:2], k.shape[2]
    counts = q.new_empty((batch, heads, len(eps), keys), dtype=torch.int32)
    return q.new_empty((batch, heads, keys), dtype=_float(backend)), counts


@torch.library.custom_op("reblock::pooled_quantiles", mutates_args=())
def pooled_quantiles(
    q: Tensor,
    k: Tensor,
    ratios: Sequence[float],
    num_keys: int | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`quantile.pooled_quantiles`: thresholds (B, h, R)."""
    return quantile.pooled_quantiles(q, k, ratios, num_keys=num_keys, lengths=lengths, backend=backend)


@pooled_quantiles.register_fake
def _(
    q: Tensor,
    k: Tensor,
    ratios: Sequence[float],
    num_keys: int | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    return q.new_empty((*q.shape[:2], len(ratios)), dtype=_float(backend))


@torch.library.custom_op("reblock::masked_attention", mutates_args=())
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    num_keys: int | None = None,
    lengths: Tensor | None = None,
    renormalise: bool = True,
    tail: str = "zero",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`masking.masked_attention`: output (B, h, N, d), realised ratio (B, h), dropped mass (B, h)."""
    return masking.masked_attention(
        q, k, v, thresholds, num_keys=num_keys, lengths=lengths, renormalise=renormalise,
        tail=cast(masking.Tail, tail), backend=backend,
    )  # fmt: skip


@masked_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    num_keys: int | None = None,
    lengths: Tensor | None = None,
    renormalise: bool = True,
    tail: str = "zero",
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    per_head, dtype = q.shape[:2], _float(backend)
    out = v.new_empty((*q.shape[:3], v.shape[-1]))
    return out, q.new_empty(per_head, dtype=dtype), q.new_empty(per_head, dtype=dtype)


def _give_no_gradients(ctx: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))


def _never_asked(ctx: Any, *gradients: Tensor) -> None:
    raise AssertionError("gradients of outputs that are not differentiable")


for _operator in (row_statistics, key_statistics, pooled_quantiles, masked_attention):
    _operator.register_autograd(_never_asked, setup_context=_give_no_gradients)
