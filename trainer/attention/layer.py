"""Everything that is kept of one layer's attention, with as few passes over its weights as the back end needs.

Legend: B batch, N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention.quantile import RANK_ERROR, pooled_quantiles, ranks
from trainer.attention.rows import Lengths, check_heads, check_lengths, check_num_keys, choose_backend
from trainer.attention.statistics import EPS, RowStatistics, key_statistics, row_statistics


@dataclass(frozen=True)
class LayerStatistics:
    """What the functions of these names give.

    Args:
        rows: `row_statistics`.
        mass: (B, h, N) column sums, of `key_statistics`.
        counts: (B, h, E, N) queries with A > eps, of `key_statistics`.
        thresholds: (B, h, R), of `pooled_quantiles`.
    """

    rows: RowStatistics
    mass: Tensor
    counts: Tensor
    thresholds: Tensor


@torch.no_grad()
def layer_statistics(
    q: Tensor,
    k: Tensor,
    *,
    eps: Sequence[float] = EPS,
    ratios: Sequence[float] = (),
    num_keys: int | None = None,
    lengths: Lengths | None = None,
    backend: str | None = None,
    chunk: int | None = None,
    rank_error: float | None = None,
) -> LayerStatistics:
    """Row statistics, key statistics and thresholds of one layer: with Triton, two passes as a rule.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, N, d).
        eps: E values.
        ratios: R shares from 0 to 1.
        num_keys: thresholds pool weights on so many leading keys; None: on all.
        lengths: (B,) valid tokens per sample; None: all.
        backend: `dense`, `chunked` or `triton`; None chooses by device.
        chunk: query rows at a time; None chooses by memory.
        rank_error: of `pooled_quantiles`.

    Raises:
        ValueError: as the three functions.
    """
    check_heads(q, k)
    valid, pooled = check_lengths(lengths, q, k), check_num_keys(num_keys, k.shape[2])
    ranks(ratios, 1)
    if choose_backend(backend, q, k) != "triton":
        rows = row_statistics(q, k, lengths=valid, backend=backend, chunk=chunk)
        mass, counts = key_statistics(q, k, eps=eps, lengths=valid, backend=backend, chunk=chunk)
        limits = pooled_quantiles(
            q, k, ratios, num_keys=num_keys, lengths=valid, backend=backend, chunk=chunk, rank_error=rank_error
        )
        return LayerStatistics(rows, mass, counts, limits)
    from trainer.attention import triton_backend

    lse, top, entropy = triton_backend.rows(q, k, valid)
    limits, mass, counts = triton_backend.quantiles(
        q, k, ratios, pooled, valid, RANK_ERROR if rank_error is None else rank_error, lse=lse, top=top, eps=eps
    )
    rows = RowStatistics(*triton_backend.row_results(lse, top, entropy, valid))
    return LayerStatistics(rows, mass, counts, limits)
