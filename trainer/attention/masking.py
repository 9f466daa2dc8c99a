"""Attention with its smallest weights removed, and the uniform control.

Legend: B batch, N queries, M keys, h heads, d head width.
"""

import torch
from torch import Tensor

from trainer.attention.rows import float32_matmul, weight_rows


@torch.no_grad()
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    chunk: int | None = None,
    renormalise: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention without the weights strictly below their head's threshold; every row keeps its largest.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, M, d).
        v: (B, h, M, d).
        thresholds: (B, h) from `pooled_quantiles`; 0 or -inf removes nothing, inf all but the row maxima.
        chunk: query rows at a time, the same as in the quantile pass; None chooses by memory.
        renormalise: rows sum to one again, as if the logits had been -inf (what a sparse kernel computes); False
            leaves zeros where weights were.

    Returns:
        Output (B, h, N, d) in v's dtype; realised ratio (B, h), the removed share of all N * M weights; dropped mass
        (B, h), the mean over rows of the removed weight, before renormalising. Both float32.

    Raises:
        ValueError: if shapes do not agree.
    """
    if thresholds.shape != q.shape[:2]:
        raise ValueError(
            f"got thresholds of shape {tuple(thresholds.shape)} for q of shape {tuple(q.shape)}, expected one per "
            "sample and head, (B, h): select one ratio of pooled_quantiles first."
        )
    values = v.float()
    limit = thresholds[..., None, None].float()
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=v.device)
    removed = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    dropped = torch.zeros(q.shape[:2], dtype=torch.float32, device=q.device)
    for start, rows in weight_rows(q, k, chunk=chunk):
        keep = rows >= torch.minimum(limit, rows.amax(dim=-1, keepdim=True))
        kept = rows * keep
        # The removed weights are summed themselves: one minus the kept mass would lose what is below 1e-7.
        dropped += rows.sub_(kept).sum(dim=(-1, -2))
        removed += keep.logical_not_().sum(dim=(-1, -2))
        part = float32_matmul(kept, values)
        if renormalise:
            part = part / kept.sum(dim=-1, keepdim=True)
        out[:, :, start : start + part.shape[2]] = part.to(v.dtype)
    return out, removed.float() / (q.shape[2] * k.shape[2]), dropped / q.shape[2]


def uniform_attention(v: Tensor) -> Tensor:
    """Every query attends to every key alike: the mean of v (B, h, M, d) over its keys, broadcast to every row."""
    return v.float().mean(dim=-2, keepdim=True).to(v.dtype).expand_as(v)
