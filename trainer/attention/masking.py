"""Attention with its smallest weights removed, and the uniform control.

Legend: B batch, N queries, M keys, h heads, d head width.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from trainer.attention import reference
from trainer.attention.rows import (
    Lengths,
    check_heads,
    check_lengths,
    check_num_keys,
    choose_backend,
    counted_weights,
    float32_matmul,
    weight_rows,
)

#: What takes the place of removed weights: nothing, or in each row their mean.
Tail = Literal["zero", "mean"]


@torch.no_grad()
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    num_keys: int | None = None,
    lengths: Lengths | None = None,
    renormalise: bool = True,
    tail: Tail = "zero",
    backend: str | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention without the weights strictly below their threshold; every row keeps its largest.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, M, d).
        v: (B, h, M, d).
        thresholds: (B, h) from `pooled_quantiles`, or (B, h, N) from `row_quantiles`; 0 or -inf removes nothing, inf
            all but the row maxima.
        num_keys: weights on keys from there on (text) are never removed; None: any may be.
        lengths: (B,) valid tokens per sample; the output is 0 at queries behind. None: all.
        renormalise: rows sum to one again, as if the logits had been -inf (what a sparse kernel computes); False
            leaves zeros where weights were. A row that lost nothing is left as it was.
        tail: `mean` puts the mean of a row's removed weights in the place of each, so that rows sum to one by
            themselves.
        backend: `dense` (float64, small N), `chunked` or `triton`; None chooses by device.
        chunk: query rows at a time, the same as in the quantile pass; None chooses by memory.

    Returns:
        Output (B, h, N, d) in v's dtype; realised ratio (B, h), the removed share of all weights that may be removed
        (N * M of them, with `num_keys` N * num_keys); dropped mass (B, h), the mean over rows of the removed weight,
        before renormalising. Both float32, float64 from the dense back end.

    Raises:
        ValueError: if shapes do not agree.
    """
    check_heads(q, k)
    valid, removable = check_lengths(lengths, q, k), check_num_keys(num_keys, k.shape[2])
    if thresholds.shape not in (q.shape[:2], q.shape[:3]):
        raise ValueError(
            f"got thresholds of shape {tuple(thresholds.shape)} for q of shape {tuple(q.shape)}, expected one per "
            "sample and head, (B, h), or per row, (B, h, N): select one ratio of pooled_quantiles first."
        )
    if tail not in get_args(Tail):
        raise ValueError(f"got tail {tail!r}, expected one of {', '.join(get_args(Tail))}.")
    chosen = choose_backend(backend, q, k)
    if chosen == "triton":
        from trainer.attention import triton_backend

        return triton_backend.masked(
            q, k, v, thresholds, removable, valid, renormalise=renormalise, tail=tail == "mean"
        )
    if chosen == "dense":
        out, realised, dropped = reference.masked_attention(
            reference.attention_weights(q, k, valid), v, thresholds, num_keys=removable, lengths=valid,
            renormalise=renormalise, tail=tail,
        )  # fmt: skip
        return out.to(v.dtype), realised, dropped
    return _chunked_masked_attention(q, k, v, thresholds, removable, valid, renormalise, tail, chunk)


def _chunked_masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    num_keys: int,
    lengths: Tensor | None,
    renormalise: bool,
    tail: Tail,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    values, keys = v.float(), k.shape[2]
    limits = thresholds[..., None].float() if thresholds.ndim == 3 else thresholds[..., None, None].float()
    spared = None  # (B, 1, 1, M): keys that are never removed
    if num_keys < keys or lengths is not None:
        last = torch.full((1,), num_keys, device=q.device) if lengths is None else lengths.clamp(max=num_keys)
        spared = (torch.arange(keys, device=q.device) >= last[:, None])[:, None, None]
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    removed = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    dropped = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    for start, rows in weight_rows(q, k, chunk=chunk, lengths=lengths):
        here = slice(start, start + rows.shape[2])
        limit = limits[:, :, here] if thresholds.ndim == 3 else limits
        # "Not below" instead of "at least": a row of NaN loses nothing, as in the reference.
        keep = (rows < torch.minimum(limit, rows.amax(dim=-1, keepdim=True))).logical_not_()
        if spared is not None:
            keep |= spared
        kept = rows * keep
        # The removed weights are summed themselves: one minus the kept mass would lose what is below 1e-7.
        lost = rows.sub_(kept).sum(dim=-1, keepdim=True)
        number = keys - keep.sum(dim=-1, keepdim=True)  # removed weights of each row
        dropped += lost.sum(dim=(-1, -2))
        removed += number.sum(dim=(-1, -2))
        if tail == "mean":
            kept += keep.logical_not_() * (lost / number.clamp(min=1))
        part = float32_matmul(kept, values)
        if renormalise and tail == "zero":
            part = part / torch.where(number > 0, kept.sum(dim=-1, keepdim=True), 1.0)
        out[:, :, here] = part.to(v.dtype)
    removable = torch.tensor(counted_weights(q, k, num_keys, lengths), dtype=torch.float32, device=q.device)
    queries = q.shape[2] if lengths is None else lengths[:, None]
    return out, removed.float() / removable[:, None], dropped / queries


def uniform_attention(v: Tensor) -> Tensor:
    """Every query attends to every key alike: the mean of v (B, h, M, d) over its keys, broadcast to every row."""
    return v.float().mean(dim=-2, keepdim=True).to(v.dtype).expand_as(v)
