"""Statistics of one attention layer's weights A: per row, per key, and what makes a sink.

Legend: B batch, N tokens ([vision | text], queries and keys), h heads, d head width, D width, E eps values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention import reference
from trainer.attention.rows import (
    Lengths,
    check_heads,
    check_lengths,
    choose_backend,
    float32_matmul,
    logit_weight_rows,
    weight_rows,
)

#: The sweep that every sink verdict is reported with; 0.3 is the default verdict.
EPS = (0.01, 0.05, 0.1, 0.3, 0.5)

#: Below this, weights above eps are no longer rare, and are counted by column instead of one by one.
_RARE = 0.004


@dataclass(frozen=True)
class RowStatistics:
    """What is kept of every row of A; 0 at queries behind a sample's length.

    Args:
        lse: (B, h, N) log-sum-exp of the row's logits, natural logarithm.
        maximum: (B, h, N) the row's largest weight.
        entropy: (B, h, N) in nats.
    """

    lse: Tensor
    maximum: Tensor
    entropy: Tensor


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


def _ratio_at(norms: Tensor, key: Tensor) -> Tensor:
    """norms (B, h, K) at key (B, h), over the mean of the others; NaN where there are no others."""
    at_key = norms.gather(-1, key[..., None])[..., 0]
    others = norms.scatter(-1, key[..., None], 0.0).sum(dim=-1) / (norms.shape[-1] - 1 or float("nan"))
    return at_key / others


def _largest_or_zero(per_key: Tensor) -> Tensor:
    """Maximum over the last axis, 0 if it is empty."""
    return per_key.amax(dim=-1) if per_key.shape[-1] else per_key.new_zeros(per_key.shape[:-1])


@torch.no_grad()
def row_statistics(
    q: Tensor,
    k: Tensor,
    *,
    lengths: Lengths | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> RowStatistics:
    """Log-sum-exp, largest weight and entropy of every query's row.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, N, d).
        lengths: (B,) valid tokens per sample; None: all.
        backend: `dense` (float64, small N), `chunked` or `triton`; None chooses by device.
        chunk: query rows at a time; None chooses by memory.

    Raises:
        ValueError: if shapes do not agree.
    """
    check_heads(q, k)
    valid = check_lengths(lengths, q, k)
    chosen = choose_backend(backend, q, k)
    if chosen == "dense":
        return RowStatistics(*reference.row_statistics(q, k, valid))
    if chosen == "triton":
        from trainer.attention import triton_backend

        return RowStatistics(*triton_backend.row_results(*triton_backend.rows(q, k, valid), valid))
    return _chunked_row_statistics(q, k, valid, chunk)


def _chunked_row_statistics(q: Tensor, k: Tensor, lengths: Tensor | None, chunk: int | None) -> RowStatistics:
    found = empty_rows(q)
    for start, logits, weights in logit_weight_rows(q, k, chunk=chunk, lengths=lengths):
        fill_rows(found, start, logits, weights)
    return clear_behind(found, lengths)


def empty_rows(q: Tensor) -> RowStatistics:
    """Room for the row statistics of q (B, h, N, d)."""
    return RowStatistics(*(torch.zeros(q.shape[:3], device=q.device) for _ in range(3)))


def fill_rows(found: RowStatistics, start: int, logits: Tensor, weights: Tensor) -> None:
    """Puts a chunk's rows into `found`; the logits (B, h, c, M) are used up."""
    here = slice(start, start + logits.shape[2])
    top, largest = logits.amax(dim=-1, keepdim=True), weights.amax(dim=-1)
    gap = logits.sub_(top).clamp_(min=-1e9)  # finite, so that a weight of 0 times its gap is 0
    found.lse[:, :, here] = top[..., 0] - largest.log()  # the largest weight is one over the sum of exp(gap)
    found.maximum[:, :, here] = largest
    # From gaps to the row's maximum, so that nothing large cancels.
    found.entropy[:, :, here] = -largest.log() - torch.linalg.vecdot(weights, gap)


def clear_behind(found: RowStatistics, lengths: Tensor | None) -> RowStatistics:
    """The same with 0 at queries behind a sample's length."""
    if lengths is not None:
        behind = torch.arange(found.lse.shape[2], device=found.lse.device) >= lengths[:, None, None]
        for part in (found.lse, found.maximum, found.entropy):
            part.masked_fill_(behind, 0.0)
    return found


@torch.no_grad()
def key_statistics(
    q: Tensor,
    k: Tensor,
    *,
    eps: Sequence[float],
    lengths: Lengths | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """How much every key receives, and from how many queries it receives more than each eps.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, N, d).
        eps: E values, in any order.
        lengths: (B,) valid tokens per sample; None: all.
        lse: `row_statistics(...).lse`, where it is known already: saves back ends that need it first a pass.
        backend: `dense` (float64, small N), `chunked` or `triton`; None chooses by device.
        chunk: query rows at a time; None chooses by memory.

    Returns:
        Column sums of A, (B, h, N) float32, and counts of A > eps, (B, h, E, N) int32; 0 behind a sample's length.
        The dense back end gives the sums in float64.

    Raises:
        ValueError: if shapes do not agree.
    """
    check_heads(q, k)
    valid = check_lengths(lengths, q, k)
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"got lse of shape {tuple(lse.shape)}, expected one per query, {tuple(q.shape[:3])}.")
    chosen = choose_backend(backend, q, k)
    if chosen == "dense":
        return reference.key_statistics(reference.attention_weights(q, k, valid), eps)
    if chosen == "triton":
        from trainer.attention import triton_backend

        if lse is None:
            base2 = triton_backend.rows(q, k, valid, entropy=False)[0]
        else:
            base2 = (lse.float() / math.log(2)).contiguous()
        return triton_backend.keys(q, k, base2, valid, eps=eps)[:2]
    return _chunked_key_statistics(q, k, eps, valid, chunk)


def _chunked_key_statistics(
    q: Tensor, k: Tensor, eps: Sequence[float], lengths: Tensor | None, chunk: int | None
) -> tuple[Tensor, Tensor]:
    mass, counts = empty_keys(k, eps)
    for _, weights in weight_rows(q, k, chunk=chunk, lengths=lengths):
        add_keys(mass, counts, weights, eps)
    return mass, counts


def empty_keys(k: Tensor, eps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Room for the column sums and counts of k (B, h, N, d)."""
    batch, heads, keys = k.shape[:3]
    mass = torch.zeros(batch, heads, keys, device=k.device)
    return mass, torch.zeros(batch, heads, len(eps), keys, dtype=torch.int32, device=k.device)


def add_keys(mass: Tensor, counts: Tensor, weights: Tensor, eps: Sequence[float]) -> None:
    """Adds a chunk's weights (B, h, c, N) to column sums and counts."""
    mass += weights.sum(dim=-2)
    if eps and min(eps) >= _RARE and weights.device.type == "cpu":
        _count_rare(weights, eps, counts)
    else:
        for index, value in enumerate(eps):
            counts[:, :, index] += (weights > value).sum(dim=-2, dtype=torch.int32)


def _count_rare(rows: Tensor, eps: Sequence[float], counts: Tensor) -> None:
    """Adds the counts of a chunk to `counts`: of the few weights above the least eps, at most 1 / eps in a row."""
    heads, keys = counts.shape[0] * counts.shape[1], counts.shape[3]
    found = (rows > min(eps)).view(heads, -1, keys)
    head, row, key = found.nonzero(as_tuple=True)
    weights, place = rows.view(heads, -1, keys)[head, row, key], head * keys + key
    for index, value in enumerate(eps):
        number = torch.bincount(place[weights > value], minlength=heads * keys)
        counts[:, :, index] += number.view(*counts.shape[:2], keys).to(torch.int32)


@torch.no_grad()
def sink_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_vision: int,
    eps: Sequence[float] = EPS,
    projection: Tensor | None = None,
    lengths: Lengths | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> SinkStatistics:
    """Sink statistics of one layer: exact counts over all queries, vision keys judged apart from text keys.

    Args:
        q: (B, h, N, d) queries as the softmax sees them (after norm and rotary), vision tokens first.
        k: (B, h, N, d).
        v: (B, h, N, d).
        num_vision: how many of the N tokens are vision tokens.
        eps: weights above these are heavy.
        projection: (h, d, D) output projection split by head, for the projected value-norm ratio.
        lengths: (B,) valid tokens per sample, vision tokens included; means are over those. None: all.
        chunk: query rows at a time; None chooses by memory.
        backend: of `key_statistics`.

    Raises:
        ValueError: if shapes do not agree or `num_vision` is not in 1 .. N, or above a sample's length.
    """
    check_heads(q, k)
    valid, queries, keys = check_lengths(lengths, q, k), q.shape[-2], k.shape[-2]
    if not 1 <= num_vision <= (keys if valid is None else int(valid.min())):
        of = f"{keys} keys" if valid is None else f"samples of {valid.tolist()} tokens"
        raise ValueError(f"got num_vision {num_vision} for {of}, expected 1 or more in each, vision tokens first.")
    mass, counts = key_statistics(q, k, eps=eps, lengths=valid, backend=backend, chunk=chunk)
    rows = queries if valid is None else valid[:, None, None]
    alpha, shares = mass / rows, counts.float() / (queries if valid is None else valid[:, None, None, None])
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
        fraction=most[..., 0].float() / rows,
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
