"""Order statistics of float32 numbers that are read in several passes and never stored.

Non-negative float32 numbers are ordered as their bit patterns read as integers. A first pass counts the leading 16 bits
of all numbers. Further passes count the remaining bits of the few numbers in the bins that hold a wanted rank, in one
histogram for each head and distinct prefix (the bits known so far). Two passes suffice, or three where many heads would
need large histograms.

Legend: g heads (of all samples), n numbers of a head in one chunk, R ranks.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

#: Leading bits of a float32 without its sign that the first pass counts, and the bits that remain.
_LEADING_BITS, _REMAINING_BITS = 16, 15
#: Most counts that the histograms of a later pass may hold (64 MiB); above, the bits are read in two passes.
_MAX_COUNTS = 2**23


def radix_select(read: Callable[[], Iterator[Tensor]], ranks: Tensor, tolerance: Tensor) -> Tensor:
    """Order statistics of each head.

    Args:
        read: starts a pass; yields chunks (g, n) int32, the bit patterns of non-negative float32 numbers or NaN.
        ranks: (g, R) int64 wanted ranks, ascending from 0.
        tolerance: (g, 1) numbers. If, after the first pass, each bin with a wanted rank holds at most so many, the
            bins' lower edges are the result.

    Returns:
        (g, R) float32.
    """
    heads, wanted = ranks.shape
    counts = torch.zeros(heads, 1, 1 << _LEADING_BITS, dtype=torch.int64, device=ranks.device)
    for chunk in read():
        for head in range(heads):  # bincount ends at the largest value: half of the bins if no number is above 1
            found = torch.bincount(_prefix(chunk[head], _REMAINING_BITS))
            counts[head, 0, : len(found)] += found
        del chunk
    prefix, ranks, in_bin = _find_bins(counts, torch.zeros_like(ranks), ranks)
    remaining = _REMAINING_BITS
    while remaining and bool((in_bin > tolerance).any()):
        digit = remaining if heads * wanted << remaining <= _MAX_COUNTS else min(remaining, 8)
        distinct, index = _distinct(prefix)
        counts = torch.zeros(heads, distinct.shape[1], 1 << digit, dtype=torch.int64, device=ranks.device)
        is_wanted = torch.zeros(heads, 1 << _LEADING_BITS, dtype=torch.bool, device=ranks.device)
        is_wanted.scatter_(1, prefix >> (_REMAINING_BITS - remaining), True)
        for chunk in read():
            for head in range(heads):
                near = chunk[head][is_wanted[head].index_select(0, _prefix(chunk[head], _REMAINING_BITS))]
                _count_digit(near, distinct[head], remaining, digit, counts[head])
            del chunk
        bins, ranks, in_bin = _find_bins(counts, index, ranks)
        prefix, remaining = (prefix << digit) | bins, remaining - digit
    return (prefix << remaining).to(torch.int32).view(torch.float32)


def _prefix(bits: Tensor, below: int) -> Tensor:
    """The bits above the lowest `below` ones, without the sign: a NaN may carry one."""
    return (bits >> below) & ((1 << (31 - below)) - 1)


def _distinct(prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's distinct prefixes, ascending, padded with the largest integer, and each prefix's index among them.

    All are (g, R).
    """
    ordered, order = prefix.sort(dim=1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    index = new.cumsum(dim=1) - 1
    distinct = torch.full_like(ordered, torch.iinfo(ordered.dtype).max).scatter(1, index, ordered)
    return distinct, torch.empty_like(index).scatter(1, order, index)


def _count_digit(bits: Tensor, prefixes: Tensor, remaining: int, digit: int, counts: Tensor) -> None:
    """Adds to `counts` (prefixes, 2^digit) the next `digit` bits of those `bits` that begin with one of `prefixes`."""
    prefix = _prefix(bits, remaining).long()
    index = torch.searchsorted(prefixes, prefix).clamp(max=len(prefixes) - 1)
    inside = prefixes[index] == prefix
    value = (bits >> (remaining - digit)) & ((1 << digit) - 1)
    flat = ((index << digit) + value)[inside]
    if flat.numel() < counts.numel():  # the usual case: few numbers, many bins
        counts.view(-1).scatter_add_(0, flat, torch.ones_like(flat))
    else:
        counts += torch.bincount(flat, minlength=counts.numel()).view(counts.shape)


def _find_bins(counts: Tensor, index: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bin that holds each rank in its histogram, the rank inside that bin, and the bin's count; each (g, R).

    Args:
        counts: (g, histograms, bins).
        index: (g, R) which histogram each rank refers to.
        ranks: (g, R) within its histogram.
    """
    cumulative = counts.cumsum(dim=-1)
    bins, before, in_bin = (torch.empty_like(ranks) for _ in range(3))
    for column in range(ranks.shape[1]):  # one at a time: a gathered (g, R, bins) would be large
        own = cumulative.gather(1, index[:, column, None, None].expand(-1, 1, cumulative.shape[-1]))[:, 0]
        at = torch.searchsorted(own, ranks[:, column, None].contiguous(), right=True)
        bins[:, column] = at[:, 0]
        before[:, column] = torch.where(at > 0, own.gather(1, (at - 1).clamp(min=0)), 0)[:, 0]
        in_bin[:, column] = own.gather(1, at)[:, 0] - before[:, column]
    return bins, ranks - before, in_bin
