"""Exact pooled quantiles of all N^2 attention weights of a head, without storing them.

Rank. The N * N weights of a head, in ascending order and counted from 0, are a_0 .. a_(N^2 - 1). The threshold at
ratio r is a_m with m = min(floor(r N^2), N^2 - 1), r read as the decimal it is written as. Removing the weights
strictly below it therefore removes at most r N^2 of them: fewer where weights tie with the threshold, none at all under
uniform attention or at r = 0. At r = 1 the threshold is the largest weight. Weights that underflow float32 are 0 and
tie.

Large N: non-negative float32 numbers are ordered as their bit patterns read as integers, so the order statistic is
found by a radix select, 11 + 10 + 10 bits in three passes over recomputed weights, with one histogram per (sample,
head) and per distinct leading part.

Legend: B batch, N tokens, h heads, d head width, R ratios.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from trainer.attention.rows import check_heads, rows_per_chunk, weight_rows

# Leading 11 bits (sign is always 0), then 10 and 10.
_TOP, _DIGIT = 1 << 11, 1 << 10


def ranks(ratios: Sequence[float], total: int) -> list[int]:
    """Index in ascending order of the threshold at each ratio, among `total` weights.

    Raises:
        ValueError: if a ratio is outside 0 .. 1.
    """
    if not all(0.0 <= r <= 1.0 for r in ratios):
        raise ValueError(f"got ratios {tuple(ratios)}, expected shares of the weights, each from 0 to 1.")
    return [min(math.floor(Fraction(str(float(r))) * total), total - 1) for r in ratios]


@torch.no_grad()
def pooled_quantiles(q: Tensor, k: Tensor, ratios: Sequence[float], *, chunk: int | None = None) -> Tensor:
    """Thresholds below which at most a share `ratio` of a head's weights lie; see the module's text for ties.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, M, d).
        ratios: R shares from 0 to 1.
        chunk: query rows at a time, the same as in the masking pass; None chooses by memory.

    Returns:
        (B, h, R) float32, each one of the weights that `weight_rows` yields.

    Raises:
        ValueError: if shapes do not agree or a ratio is outside 0 .. 1.
    """
    check_heads(q, k)
    wanted = ranks(ratios, q.shape[2] * k.shape[2])
    if rows_per_chunk(q, k, chunk) >= q.shape[2]:
        weights = next(weight_rows(q, k, chunk=chunk))[1]
        return _sorted(weights.flatten(2))[..., wanted]
    return _radix_select(lambda: (rows for _, rows in weight_rows(q, k, chunk=chunk)), wanted)


def _sorted(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # numpy's vectorised sort is ten times as fast as torch's on a CPU
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _radix_select(chunks: Callable, wanted: list[int]) -> Tensor:
    """The order statistics `wanted` of each (sample, head) over all that `chunks()` yields, (B, h, R)."""
    first = next(chunks())
    shape, device = first.shape[:2], first.device
    del first
    heads = shape.numel()
    rank = torch.tensor(wanted, device=device).expand(heads, -1).clone()  # (heads, R), within the chosen bins so far

    top, rank = _choose(_histogram(chunks, heads, device, [], _TOP), None, rank)
    slot1, of_ratio1 = _slots(top, _TOP)
    mid, rank = _choose(_histogram(chunks, heads, device, [slot1], _DIGIT), of_ratio1, rank)
    slot2, of_ratio2 = _slots(of_ratio1 * _DIGIT + mid, (len(wanted) + 1) * _DIGIT)
    low, rank = _choose(_histogram(chunks, heads, device, [slot1, slot2], _DIGIT), of_ratio2, rank)
    bits = (top << 20) | (mid << 10) | low
    return bits.to(torch.int32).view(torch.float32).reshape(*shape, len(wanted))


def _slots(prefixes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Numbers the distinct `prefixes` (heads, R) of each head from 1; 0 stands for "no ratio ends in here".

    Returns:
        table (heads, size) from prefix to slot, and the slot of each ratio (heads, R).
    """
    table = torch.zeros(prefixes.shape[0], size, dtype=torch.int64, device=prefixes.device)
    table.scatter_(1, prefixes, 1)
    table = table * table.cumsum(dim=1)
    return table, table.gather(1, prefixes)


def _histogram(chunks: Callable, heads: int, device: torch.device, tables: list[Tensor], digit: int) -> Tensor:
    """Counts (heads, slots, digit) of the next digit of every weight, by the slot that its leading digits lead to."""
    slots = 1 + int(tables[-1].max()) if tables else 1
    counts = torch.zeros(heads * slots * digit, dtype=torch.int64, device=device)
    offset = torch.arange(heads, device=device)[:, None]
    for rows in chunks():
        bits = rows.flatten(0, 1).flatten(1).view(torch.int32).long() & 0x7FFFFFFF  # (heads, c * M)
        digits = [bits >> 20, (bits >> 10) & (_DIGIT - 1), bits & (_DIGIT - 1)]
        slot = torch.zeros((), dtype=torch.int64, device=device)
        for table, leading in zip(tables, digits, strict=False):
            size = _TOP if leading is digits[0] else _DIGIT
            slot = table.gather(1, slot * size + leading)
        index = (offset * slots + slot) * digit + digits[len(tables)]
        counts += torch.bincount(index.flatten(), minlength=counts.numel())
    return counts.view(heads, slots, digit)


def _choose(counts: Tensor, slot: Tensor | None, rank: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds each rank within its slot, (heads, R), and the rank inside that bin."""
    if slot is None:
        slot = torch.zeros_like(rank)
    below = counts.cumsum(dim=-1)  # (heads, slots, digit)
    below = below.gather(1, slot[..., None].expand(-1, -1, below.shape[-1]))  # (heads, R, digit)
    chosen = (below <= rank[..., None]).sum(dim=-1)
    before = torch.nn.functional.pad(below, (1, 0)).gather(-1, chosen[..., None])[..., 0]
    return chosen, rank - before
