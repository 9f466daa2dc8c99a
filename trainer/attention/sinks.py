"""What makes an attention sink, from the column sums and counts of one layer.

Legend: B batch, N tokens ([vision | text], queries and keys), h heads, d head width, D model width, E eps values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention.float32 import float32_matmul
from trainer.attention.inputs import Inputs

#: The eps values that every sink verdict is reported for; 0.3 is the default verdict.
EPS = (0.01, 0.05, 0.1, 0.3, 0.5)


@dataclass(frozen=True)
class SinkStatistics:
    """Sink statistics of one layer's attention weights A; shares and means are over all valid queries.

    Args:
        eps: the E values.
        fraction: (B, h, E) largest mean_i 1[A_ik > eps] over vision keys k; queries i are all tokens.
        key: (B, h, E) that vision key; among equals the one with the larger alpha.
        text_fraction: (B, h, E) the same largest share over text keys; 0 without text.
        alpha: (B, h) largest alpha_k = mean_i A_ik over vision keys.
        alpha_key: (B, h) that vision key.
        text_alpha: (B, h) largest alpha_k over text keys; 0 without text.
        value_norm_ratio: (B, h) |v_k| at `alpha_key` over the mean of the other vision keys; NaN if there is none.
        projected_value_norm_ratio: (B, h) the same with |v_k W_h|; None if no projection was given.
        queries: N, rows of A, padding included.
        keys: N, columns of A, text and padding included.
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


def summarise(
    x: Inputs, v: Tensor, mass: Tensor, counts: Tensor, *, num_vision: int, eps: Sequence[float],
    projection: Tensor | None,
) -> SinkStatistics:  # fmt: skip
    """As `api.sink_statistics`, from the results of `key_statistics`.

    Args:
        x: the layer.
        v: (B, h, N, d).
        mass: (B, h, N) column sums.
        counts: (B, h, E, N).
        num_vision: leading vision tokens.
        eps: the E values.
        projection: (h, d, D), or None.
    """
    rows = x.q.shape[2] if x.lengths is None else x.lengths[:, None, None]
    alpha = mass / rows
    shares = counts.float() / (x.q.shape[2] if x.lengths is None else x.lengths[:, None, None, None])
    vision_alpha, vision_counts, vision_v = alpha[..., :num_vision], counts[..., :num_vision], v[:, :, :num_vision]
    most = vision_counts.amax(dim=-1, keepdim=True)
    largest, alpha_key = vision_alpha.max(dim=-1)
    return SinkStatistics(
        eps=tuple(eps),
        fraction=most[..., 0].float() / rows,
        key=torch.where(vision_counts == most, vision_alpha[:, :, None], -1.0).argmax(dim=-1),
        text_fraction=_largest_or_zero(shares[..., num_vision:]),
        alpha=largest,
        alpha_key=alpha_key,
        text_alpha=_largest_or_zero(alpha[..., num_vision:]),
        value_norm_ratio=_ratio_to_others(vision_v.float().norm(dim=-1), alpha_key),
        projected_value_norm_ratio=None
        if projection is None
        else _ratio_to_others(through_projection(vision_v, projection), alpha_key),
        queries=x.q.shape[2],
        keys=x.k.shape[2],
    )


def _ratio_to_others(norms: Tensor, key: Tensor) -> Tensor:
    """Norms (B, h, K) at key (B, h), over the mean of the other norms; NaN if there are no others."""
    at_key = norms.gather(-1, key[..., None])[..., 0]
    others = norms.scatter(-1, key[..., None], 0.0).sum(dim=-1) / (norms.shape[-1] - 1 or float("nan"))
    return at_key / others


def _largest_or_zero(per_key: Tensor) -> Tensor:
    """Maximum over the last axis, 0 if it is empty."""
    return per_key.amax(dim=-1) if per_key.shape[-1] else per_key.new_zeros(per_key.shape[:-1])
