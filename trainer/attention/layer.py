"""Everything that is kept of one layer's attention, with as few passes over its weights as the back end needs.

Legend: B batch, N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.attention.quantile import RANK_ERROR, chunked_pooled_quantiles, pooled_quantiles, ranks
from trainer.attention.rows import Lengths, check_heads, check_lengths, check_num_keys, choose_backend
from trainer.attention.statistics import (
    EPS,
    RowStatistics,
    add_keys,
    clear_behind,
    empty_keys,
    empty_rows,
    fill_rows,
    key_statistics,
    row_statistics,
)


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
    """Row statistics, key statistics and thresholds of one layer, in two passes over its weights as a rule.

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
    chosen = choose_backend(backend, q, k)
    if chosen == "chunked":
        return _chunked_layer(q, k, eps, ratios, pooled, valid, chunk, rank_error or 0.0)
    if chosen == "dense":
        rows = row_statistics(q, k, lengths=valid, backend=backend)
        mass, counts = key_statistics(q, k, eps=eps, lengths=valid, backend=backend)
        limits = pooled_quantiles(q, k, ratios, num_keys=num_keys, lengths=valid, backend=backend)
        return LayerStatistics(rows, mass, counts, limits)
    from trainer.attention import triton_backend

    lse, top, entropy = triton_backend.rows(q, k, valid)
    limits, mass, counts = triton_backend.quantiles(
        q, k, ratios, pooled, valid, RANK_ERROR if rank_error is None else rank_error, lse=lse, top=top, eps=eps
    )
    rows = RowStatistics(*triton_backend.row_results(lse, top, entropy, valid))
    return LayerStatistics(rows, mass, counts, limits)


def _chunked_layer(
    q: Tensor, k: Tensor, eps: Sequence[float], ratios: Sequence[float], num_keys: int, lengths: Tensor | None,
    chunk: int | None, rank_error: float,
) -> LayerStatistics:  # fmt: skip
    """The first pass of the thresholds is the one that rows and keys are read in."""
    rows, (mass, counts) = empty_rows(q), empty_keys(k, eps)

    def look(start: int, logits: Tensor, weights: Tensor) -> None:
        fill_rows(rows, start, logits, weights)
        add_keys(mass, counts, weights, eps)

    limits = chunked_pooled_quantiles(q, k, ratios, num_keys, lengths, chunk, rank_error, look)
    return LayerStatistics(clear_behind(rows, lengths), mass, counts, limits)
