"""Exact quantiles of the chunked weights, without storing them.

Rank. The n pooled weights of a head (n = N M if all count), in ascending order and counted from 0, are
a_0 .. a_(n - 1). The threshold at ratio r is a_m with m = min(floor(r n), n - 1), r read as the decimal it is written
as. Removing the weights strictly below it therefore removes at most r n of them: fewer where weights tie with the
threshold, none at all under uniform attention or at r = 0. At r = 1 the threshold is the largest weight. Weights that
underflow float32 are 0 and tie.

Rank error. Where every bin of the radix select's first pass that holds a threshold has at most a share `rank_error` of
the weights, the bins' lower edges are the thresholds: then between r - rank_error and r of the weights, again as shares
and but for ties, lie strictly below. A rank error of 0 gives the order statistic itself.

Legend: B batch, N queries, M keys, h heads, c query rows of a chunk, R ratios.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from trainer.attention.chunked_weights import logit_and_weight_chunks, rows_per_chunk, weight_chunks
from trainer.attention.inputs import Inputs, threshold_ranks
from trainer.attention.radix_select import radix_select

#: Called with a chunk's first row, its logits and its weights, both (B, h, c, M); may overwrite the logits.
ChunkObserver = Callable[[int, Tensor, Tensor], None]


def pooled_quantiles(
    x: Inputs, ratios: Sequence[float], rank_error: float, observer: ChunkObserver | None = None
) -> Tensor:
    """Thresholds of each head, (B, h, R) float32; `observer` is called with every chunk of the first pass."""
    batch, heads, queries = x.q.shape[:3]
    totals = x.pool_sizes()
    # Weights of padded queries and keys are 0, and none is smaller: they only move every rank up by their number.
    wanted = [[queries * x.num_keys - total + r for r in threshold_ranks(ratios, total)] for total in totals]
    ranks = torch.tensor(wanted, dtype=torch.int64, device=x.q.device)[:, None].expand(-1, heads, -1)  # (B, h, R)
    first_pass = iter([observer])

    def pooled_chunks() -> Iterator[Tensor]:
        """One pass over the weights that are pooled, (B, h, c, num_keys)."""
        observe = next(first_pass, None)
        for start, logits, weights in logit_and_weight_chunks(x):
            if observe is not None:
                observe(start, logits, weights)
            del logits
            yield weights[..., : x.num_keys]
            del weights

    if rows_per_chunk(x) >= queries:
        return _sorted(next(pooled_chunks()).flatten(2)).gather(2, ranks)
    if not ratios:
        for _ in pooled_chunks():
            pass
        return torch.empty(batch, heads, 0, device=x.q.device)

    def bit_patterns() -> Iterator[Tensor]:
        for weights in pooled_chunks():
            yield weights.flatten(0, 1).flatten(1).view(torch.int32)  # (B * h, weights of the chunk)
            del weights

    tolerance = torch.tensor([rank_error * total for total in totals], device=x.q.device).repeat_interleave(heads)
    found = radix_select(bit_patterns, ranks.flatten(0, 1).clone(), tolerance[:, None])
    return found.view(batch, heads, len(ratios))


def row_quantiles(x: Inputs, ratios: Sequence[float]) -> Tensor:
    """Thresholds of each row, (B, h, N, R) float32; 0 at padded queries."""
    # Weights of padded keys are 0, and none is smaller: they only move every rank up by their number.
    sizes = [x.num_keys] * len(x.q) if x.lengths is None else [min(n, x.num_keys) for n in x.lengths.tolist()]
    wanted = [[x.num_keys - size + r for r in threshold_ranks(ratios, size)] for size in sizes]
    ranks = torch.tensor(wanted, dtype=torch.int64, device=x.q.device)[:, None, None]  # (B, 1, 1, R)
    found = torch.empty(*x.q.shape[:3], len(ratios), device=x.q.device)
    for start, weights in weight_chunks(x):
        ordered = _sorted(weights[..., : x.num_keys])
        found[:, :, start : start + weights.shape[2]] = ordered.gather(3, ranks.expand(*weights.shape[:3], -1))
    return found


def _sorted(values: Tensor) -> Tensor:
    """`values` ascending along the last axis."""
    if values.device.type == "cpu":  # numpy's vectorised sort is ten times as fast as torch's on a CPU
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values
