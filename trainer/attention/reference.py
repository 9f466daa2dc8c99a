"""Dense float64 truth that every fast path is tested against. Stores all N^2 weights: for small N only.

Legend: B batch, N tokens, h heads, d head width, R ratios, E eps values.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor


def attention_weights(q: Tensor, k: Tensor) -> Tensor:
    """A = softmax(Q K^T / sqrt(d)), (B, h, N, N) float64."""
    return torch.softmax(q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)


def heavy_fractions(weights: Tensor, eps: Sequence[float]) -> Tensor:
    """mean_i 1[A_ik > eps] for every key k, (B, h, N, E) float64."""
    return torch.stack([(weights > e).double().mean(dim=-2) for e in eps], dim=-1)


def alpha(weights: Tensor) -> Tensor:
    """alpha_k = mean_i A_ik, (B, h, N) float64."""
    return weights.mean(dim=-2)


def rank(ratio: float, total: int) -> int:
    """Index, from 0 in ascending order, of the weight that is the threshold at `ratio`: floor(ratio * total), at most
    total - 1. So at most ratio * total weights lie strictly below it."""
    return min(math.floor(Fraction(str(ratio)) * total), total - 1)


def pooled_quantiles(weights: Tensor, ratios: Sequence[float]) -> Tensor:
    """The order statistic of all N^2 weights of a head at each ratio, (B, h, R)."""
    ordered = weights.flatten(2).sort(dim=-1).values
    return torch.stack([ordered[..., rank(r, ordered.shape[-1])] for r in ratios], dim=-1)


def masked_attention(
    weights: Tensor, v: Tensor, thresholds: Tensor, *, renormalise: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, h, N, d), removed share (B, h) and dropped mass (B, h), all float64.

    Weights strictly below their head's threshold are removed, except each row's largest.
    """
    removed = (weights < thresholds.double()[..., None, None]) & (weights < weights.amax(dim=-1, keepdim=True))
    kept = weights.masked_fill(removed, 0.0)
    dropped = (weights - kept).sum(dim=-1).mean(dim=-1)
    if renormalise:
        kept = kept / kept.sum(dim=-1, keepdim=True)
    return kept @ v.double(), removed.double().mean(dim=(-1, -2)), dropped


def value_norm_ratio(norms: Tensor, key: Tensor) -> Tensor:
    """|v_key| / mean of the other norms; norms (B, h, N), key (B, h)."""
    at_key = norms.gather(-1, key[..., None])[..., 0]
    return at_key / ((norms.sum(dim=-1) - at_key) / (norms.shape[-1] - 1))
