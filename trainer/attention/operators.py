"""Functions of the engine as operators of torch (`torch.ops.reblock`), which a compiled model calls in its graph.

Each takes and gives what the function of the same name in `api` does, with tensors and plain values alone, and has a
fake implementation that gives the results' shapes. Their outputs have no gradients, so a model in training may call
them too.

Legend: B batch, N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from trainer.attention import api
from trainer.attention.backend import Tail


def _result_dtype(backend: str | None) -> torch.dtype:
    return torch.float64 if backend == "dense" else torch.float32


@torch.library.custom_op("reblock::row_statistics", mutates_args=())
def row_statistics(
    q: Tensor, k: Tensor, lengths: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, largest weight and entropy of each row, (B, h, N) each."""
    rows = api.row_statistics(q, k, lengths=lengths, backend=backend)
    return rows.lse, rows.maximum, rows.entropy


@row_statistics.register_fake
def _(q, k, lengths=None, backend=None):
    return tuple(q.new_empty(q.shape[:3], dtype=_result_dtype(backend)) for _ in range(3))


@torch.library.custom_op("reblock::key_statistics", mutates_args=())
def key_statistics(
    q: Tensor, k: Tensor, eps: Sequence[float], lengths: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Column sums (B, h, N), and counts of A > eps (B, h, E, N)."""
    return api.key_statistics(q, k, eps=eps, lengths=lengths, backend=backend)


@key_statistics.register_fake
def _(q, k, eps, lengths=None, backend=None):
    counts = q.new_empty((*q.shape[:2], len(eps), k.shape[2]), dtype=torch.int32)
    return q.new_empty(k.shape[:3], dtype=_result_dtype(backend)), counts


@torch.library.custom_op("reblock::pooled_quantiles", mutates_args=())
def pooled_quantiles(
    q: Tensor,
    k: Tensor,
    ratios: Sequence[float],
    num_keys: int | None = None,
    lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Thresholds (B, h, R)."""
    return api.pooled_quantiles(q, k, ratios, num_keys=num_keys, lengths=lengths, backend=backend)


@pooled_quantiles.register_fake
def _(q, k, ratios, num_keys=None, lengths=None, backend=None):
    return q.new_empty((*q.shape[:2], len(ratios)), dtype=_result_dtype(backend))


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
    """Output (B, h, N, d), realised ratio (B, h), dropped mass (B, h)."""
    return api.masked_attention(
        q, k, v, thresholds, num_keys=num_keys, lengths=lengths, renormalise=renormalise,
        tail=cast(Tail, tail), backend=backend,
    )  # fmt: skip


@masked_attention.register_fake
def _(q, k, v, thresholds, num_keys=None, lengths=None, renormalise=True, tail="zero", backend=None):
    realised = q.new_empty(q.shape[:2], dtype=_result_dtype(backend))
    return v.new_empty((*q.shape[:3], v.shape[-1])), realised, torch.empty_like(realised)


def _mark_non_differentiable(ctx: Any, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*([output] if isinstance(output, Tensor) else output))


def _backward(ctx: Any, *gradients: Tensor) -> None:
    raise AssertionError("torch asked for gradients of outputs that are not differentiable")


for _operator in (row_statistics, key_statistics, pooled_quantiles, masked_attention):
    _operator.register_autograd(_backward, setup_context=_mark_non_differentiable)
