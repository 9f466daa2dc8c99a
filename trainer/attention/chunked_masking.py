"""Attention with its smallest weights removed, a chunk of query rows at a time, in float32.

Legend: B batch, N queries, M keys, h heads, d head width, c query rows of a chunk.
"""

import torch
from torch import Tensor

from trainer.attention.backend import Tail
from trainer.attention.chunked_weights import weight_chunks
from trainer.attention.float32 import float32_matmul
from trainer.attention.inputs import Inputs


def masked_attention(
    x: Inputs, v: Tensor, thresholds: Tensor, renormalise: bool, tail: Tail
) -> tuple[Tensor, Tensor, Tensor]:
    """As `api.masked_attention`: output (B, h, N, d), realised ratio (B, h), dropped mass (B, h)."""
    q, values, keys = x.q, v.float(), x.k.shape[2]
    limits = thresholds[..., None].float() if thresholds.ndim == 3 else thresholds[..., None, None].float()
    protected = _protected_keys(x)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    removed = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    dropped = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    for start, weights in weight_chunks(x):
        rows = slice(start, start + weights.shape[2])
        limit = limits[:, :, rows] if thresholds.ndim == 3 else limits
        # "Not below" instead of "at least": a row of NaN loses nothing, as in the dense reference.
        keep = (weights < torch.minimum(limit, weights.amax(dim=-1, keepdim=True))).logical_not_()
        if protected is not None:
            keep |= protected
        kept = weights * keep
        # The removed weights are summed themselves: one minus the kept mass would lose what is below 1e-7.
        mass = weights.sub_(kept).sum(dim=-1, keepdim=True)
        number = keys - keep.sum(dim=-1, keepdim=True)  # removed weights of each row
        dropped += mass.sum(dim=(-1, -2))
        removed += number.sum(dim=(-1, -2))
        if tail == "mean":
            kept += keep.logical_not_() * (mass / number.clamp(min=1))
        part = float32_matmul(kept, values)
        if renormalise and tail == "zero":
            part = part / torch.where(number > 0, kept.sum(dim=-1, keepdim=True), 1.0)
        out[:, :, rows] = part.to(v.dtype)
    removable = torch.tensor(x.pool_sizes(), dtype=torch.float32, device=q.device)
    queries = q.shape[2] if x.lengths is None else x.lengths[:, None]
    return out, removed.float() / removable[:, None], dropped / queries


def _protected_keys(x: Inputs) -> Tensor | None:
    """Keys that are never removed, (B or 1, 1, 1, M) bool: padding, and those from `num_keys` on; None if no key is."""
    keys = x.k.shape[2]
    if x.num_keys == keys and x.lengths is None:
        return None
    last = torch.full((1,), x.num_keys, device=x.q.device) if x.lengths is None else x.lengths.clamp(max=x.num_keys)
    return (torch.arange(keys, device=x.q.device) >= last[:, None])[:, None, None]
