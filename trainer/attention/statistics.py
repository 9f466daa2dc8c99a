"""Sink statistics of one attention layer, streamed in row chunks.

Legend: B batch, N tokens ([vision | text], queries and keys), h heads, d head width, D width, E eps values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention.rows import float32_matmul, weight_rows

#: The sweep that every sink verdict is reported with; 0.3 is the default verdict.
EPS = (0.01, 0.05, 0.1, 0.3, 0.5)


@dataclass(frozen=True)
class SinkStatistics:
    """What is kept of a layer's attention weights A.

    Args:
        eps: the E values of the sweep.
        fraction: (B, h, E) largest mean_i 1[A_ik > eps] over vision keys k; queries i are all tokens.
        key: (B, h, E) that vision key; among equals the one with the larger alpha.
        text_fraction: (B, h, E) the same largest share over text keys; 0 without text.
        alpha: (B, h) largest alpha_k = mean_i A_ik over vision keys.
        alpha_key: (B, h) that vision key.
        text_alpha: (B, h) largest alpha_k over text keys; 0 without text.
        value_norm_ratio: (B, h) |v_k| at `alpha_key` over the mean of the other vision keys; NaN if there is none.
        projected_value_norm_ratio: (B, h) the same with |v_k W_h|; None if no projection was given.
        queries: N, rows of A.
        keys: N, columns of A, text included.
    """

    eps: tuple[float, ...]
    fraction: Tensor
    key: Tensor
    text_fraction: Tensor
    alpha: Tensor
    alpha_key: Tensor
    text_alpha: Tensor
    value_norm_ratio: Tensor
    projected_value_norm_ratio: Tensor | None
    queries: int
    keys: int


def sink_verdict(fraction: Tensor) -> Tensor:
    """True where over half of all queries attend heavily to one single key."""
    return fraction > 0.5


def through_projection(v: Tensor, projection: Tensor) -> Tensor:
    """|v_k W_h| for every key, (B, h, N) float32.

    With W_h^T = Q R and Q orthonormal, |v W_h| = |v R^T|: d x d instead of d x D, so nothing of size N x D is made.

    Args:
        v: (B, h, N, d) values.
        projection: (h, d, D) the output projection split by head.
    """
    triangle = torch.linalg.qr(projection.float().transpose(-1, -2), mode="r").R  # (h, min(d, D), d)
    return float32_matmul(v, triangle.transpose(-1, -2)).norm(dim=-1)


def _ratio_at(norms: Tensor, key: Tensor) -> Tensor:
    """norms (B, h, K) at key (B, h), over the mean of the others; NaN where there are no others."""
    at_key = norms.gather(-1, key[..., None])[..., 0]
    others = norms.scatter(-1, key[..., None], 0.0).sum(dim=-1) / (norms.shape[-1] - 1 or float("nan"))
    return at_key / others


def _largest_or_zero(per_key: Tensor) -> Tensor:
    """Maximum over the last axis, 0 if it is empty."""
    return per_key.amax(dim=-1) if per_key.shape[-1] else per_key.new_zeros(per_key.shape[:-1])


def _accumulate(q: Tensor, k: Tensor, eps: Sequence[float], chunk: int | None) -> tuple[Tensor, Tensor]:
    """Column sums of A, (B, h, N) float32, and counts of A > eps, (B, h, E, N) int32."""
    batch, heads, keys = k.shape[:3]
    mass = torch.zeros(batch, heads, keys, device=q.device)
    counts = torch.zeros(batch, heads, len(eps), keys, dtype=torch.int32, device=q.device)
    for _, rows in weight_rows(q, k, chunk=chunk):
        mass += rows.sum(dim=-2)
        for index, value in enumerate(eps):
            counts[:, :, index] += (rows > value).sum(dim=-2, dtype=torch.int32)
    return mass, counts


@torch.no_grad()
def sink_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_vision: int,
    eps: Sequence[float] = EPS,
    projection: Tensor | None = None,
    chunk: int | None = None,
) -> SinkStatistics:
    """Sink statistics of one layer: exact counts over all queries, vision keys judged apart from text keys.

    Args:
        q: (B, h, N, d) queries as the softmax sees them (after norm and rotary), vision tokens first.
        k: (B, h, N, d).
        v: (B, h, N, d).
        num_vision: how many of the N tokens are vision tokens.
        eps: weights above these are heavy.
        projection: (h, d, D) output projection split by head, for the projected value-norm ratio.
        chunk: query rows at a time; None chooses by memory.

    Raises:
        ValueError: if shapes do not agree or `num_vision` is not in 1 .. N.
    """
    queries, keys = q.shape[-2], k.shape[-2]
    if not 1 <= num_vision <= keys:
        raise ValueError(f"got num_vision {num_vision} for {keys} keys, expected 1 .. {keys}, vision tokens first.")
    mass, counts = _accumulate(q, k, eps, chunk)
    alpha, shares = mass / queries, counts.float() / queries
    vision_alpha, vision_counts = alpha[..., :num_vision], counts[..., :num_vision]
    most = vision_counts.amax(dim=-1, keepdim=True)
    key = torch.where(vision_counts == most, vision_alpha[:, :, None], -1.0).argmax(dim=-1)
    largest, alpha_key = vision_alpha.max(dim=-1)
    vision_v = v[:, :, :num_vision]
    projected = None
    if projection is not None:
        projected = _ratio_at(through_projection(vision_v, projection), alpha_key)
    return SinkStatistics(
        eps=tuple(eps),
        fraction=most[..., 0].float() / queries,
        key=key,
        text_fraction=_largest_or_zero(shares[..., num_vision:]),
        alpha=largest,
        alpha_key=alpha_key,
        text_alpha=_largest_or_zero(alpha[..., num_vision:]),
        value_norm_ratio=_ratio_at(vision_v.float().norm(dim=-1), alpha_key),
        projected_value_norm_ratio=projected,
        queries=queries,
        keys=keys,
    )
