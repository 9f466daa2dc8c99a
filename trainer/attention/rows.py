"""The one place where attention weights are computed: row chunks of A = softmax(Q K^T / sqrt(d)) in float32.

The quantile pass and the masking pass both read their weights from here, with the same chunks, so that a weight
compares with a threshold taken from it as equal, bit for bit.

Legend: B batch, N queries, M keys, h heads, d head width, c rows of a chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

#: Default size of one chunk, in weights: 128 MiB of float32.
CHUNK_WEIGHTS = 2**25


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless q and k are (B, h, tokens, d) with equal B, h, d and at least one token."""
    same = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not same or 0 in (q.shape[2], k.shape[2]):
        raise ValueError(
            f"got q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)}, expected (B, h, tokens, d) with equal "
            "B, h, d and at least one token each. Move the head axis before the token axis."
        )


def rows_per_chunk(q: Tensor, k: Tensor, chunk: int | None = None) -> int:
    """Query rows c of a chunk: `chunk` if given, else as many as `CHUNK_WEIGHTS` allows; never above N.

    Raises:
        ValueError: if `chunk` is below 1.
    """
    if chunk is None:
        chunk = max(1, CHUNK_WEIGHTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    if chunk < 1:
        raise ValueError(f"got chunk {chunk}, expected at least one query row, or None to have it chosen.")
    return min(chunk, q.shape[2])


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in true float32: neither autocast nor TF32 may round what is being measured."""
    before = torch.get_float32_matmul_precision()
    if before == "highest" and not torch.is_autocast_enabled(a.device.type):
        return a.float() @ b.float()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(a.device.type, enabled=False):
            return a.float() @ b.float()
    finally:
        torch.set_float32_matmul_precision(before)


def weight_rows(q: Tensor, k: Tensor, *, chunk: int | None = None) -> Iterator[tuple[int, Tensor]]:
    """Row chunks of the attention weights, in order.

    Args:
        q: (B, h, N, d), any floating dtype.
        k: (B, h, M, d).
        chunk: query rows at a time; None chooses by memory.

    Yields:
        First row of the chunk and its weights (B, h, c, M), float32; the caller may write into them.

    Raises:
        ValueError: if shapes do not agree.
    """
    check_heads(q, k)
    rows = rows_per_chunk(q, k, chunk)
    q = q.float() * q.shape[-1] ** -0.5
    k = k.float().transpose(-1, -2)
    for start in range(0, q.shape[2], rows):
        yield start, torch.softmax(float32_matmul(q[:, :, start : start + rows], k), dim=-1)
