"""Exact pooled quantiles of all N^2 attention weights of a head, without storing them.

Rank. The N * N weights of a head, in ascending order and counted from 0, are a_0 .. a_(N^2 - 1). The threshold at
ratio r is a_m with m = min(floor(r N^2), N^2 - 1), r read as the decimal it is written as. Removing the weights
strictly below it therefore removes at most r N^2 of them: fewer where weights tie with the threshold, none at all under
uniform attention or at r = 0. At r = 1 the threshold is the largest weight. Weights that underflow float32 are 0 and
tie.

Large N: non-negative float32 numbers are ordered as their bit patterns read as integers, so the order statistic is
found by a radix select over recomputed weights: a pass over the leading 16 bits of all weights, then passes over the
rest of those few that lie in the bins where a ratio ends, in one histogram per (sample, head) and distinct leading
part. Two passes, or three where many heads would need large histograms.

Rank error. Where every bin that a ratio ends in holds at most a share `rank_error` of the weights, the bins' lower
edges are returned after the first pass: then between r - rank_error and r of the weights, again as shares and bar
ties, lie strictly below. A rank error of 0 gives the order statistic itself.

Legend: B batch, N tokens, h heads, d head width, R ratios.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
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
    logit_weight_rows,
    rows_per_chunk,
    shares,
    weight_rows,
)

#: What sees a chunk on its way: its first row, logits and weights, both (B, h, c, N).
Look = Callable[[int, Tensor, Tensor], None]

#: Leading bits of a float32 without its sign that the first pass tells apart, and those that are left.
_TOP, _REST = 16, 15
#: Of the Triton back end, if nothing else is asked for.
RANK_ERROR = 1e-4
#: By which a weight may differ between back ends, as a share of itself.
_ROUNDING = 2.0**-17
#: The second pass's histograms may hold so many counts (64 MiB); above, its bits are read in two passes.
_COUNTS = 2**23


def ranks(ratios: Sequence[float], total: int) -> list[int]:
    """Index in ascending order of the threshold at each ratio, among `total` weights.

    Raises:
        ValueError: if a ratio is outside 0 .. 1.
    """
    if not all(0.0 <= r <= 1.0 for r in ratios):
        raise ValueError(f"got ratios {tuple(ratios)}, expected shares of the weights, each from 0 to 1.")
    return [min(share, total - 1) for share in shares(ratios, total)]


@torch.no_grad()
def pooled_quantiles(
    q: Tensor,
    k: Tensor,
    ratios: Sequence[float],
    *,
    num_keys: int | None = None,
    lengths: Lengths | None = None,
    backend: str | None = None,
    chunk: int | None = None,
    rank_error: float | None = None,
) -> Tensor:
    """Thresholds below which at most a share `ratio` of a head's weights lie; see the module's text for ties.

    Args:
        q: (B, h, N, d) queries as the softmax sees them.
        k: (B, h, M, d).
        ratios: R shares from 0 to 1.
        num_keys: only weights on so many leading keys (vision) are pooled; None: on all.
        lengths: (B,) valid tokens per sample: weights of others are not pooled. None: all are.
        backend: `dense` (float64, small N), `chunked` or `triton`; None chooses by device.
        chunk: query rows at a time, the same as in the masking pass; None chooses by memory.
        rank_error: how far the share below a threshold may fall short of its ratio (Triton: differ from it, by three
            standard errors); 0: as little as ties allow. None: 1e-4 of the Triton back end, 0 of the others.

    Returns:
        (B, h, R) float32, each one of the weights that `weight_rows` yields unless `rank_error` is above 0. The dense
        back end's are float64, so that they compare as equal with its weights.

    Raises:
        ValueError: if shapes do not agree, or a ratio or `rank_error` is outside 0 .. 1.
    """
    check_heads(q, k)
    valid, pooled = check_lengths(lengths, q, k), check_num_keys(num_keys, k.shape[2])
    if rank_error is not None and not 0.0 <= rank_error <= 1.0:
        raise ValueError(f"got rank_error {rank_error}, expected a share of the weights, e.g. 1e-4.")
    ranks(ratios, 1)  # refuses ratios before any work
    chosen = choose_backend(backend, q, k)
    if chosen == "dense":
        weights = reference.attention_weights(q, k, valid)
        return reference.pooled_quantiles(weights, ratios, num_keys=pooled, lengths=valid)
    if chosen == "triton":
        from trainer.attention import triton_backend

        error = RANK_ERROR if rank_error is None else rank_error
        lse, top, _ = triton_backend.rows(q, k, valid, entropy=False)
        return triton_backend.quantiles(q, k, ratios, pooled, valid, error, lse=lse, top=top)[0]
    return chunked_pooled_quantiles(q, k, ratios, pooled, valid, chunk, rank_error or 0.0)


def chunked_pooled_quantiles(
    q: Tensor,
    k: Tensor,
    ratios: Sequence[float],
    num_keys: int,
    lengths: Tensor | None,
    chunk: int | None,
    rank_error: float,
    look: Look | None = None,
) -> Tensor:
    """As `pooled_quantiles`; `look` sees every chunk of the first pass, and may use up its logits."""
    batch, heads, queries = q.shape[:3]
    # Weights of invalid queries and keys are 0, none is smaller: they only move every rank up by their number.
    totals = counted_weights(q, k, num_keys, lengths)
    wanted = [[queries * num_keys - total + r for r in ranks(ratios, total)] for total in totals]
    rank = torch.tensor(wanted, dtype=torch.int64, device=q.device)[:, None].expand(-1, heads, -1)  # (B, h, R)
    looks = [] if look is None else [look]

    def chunks() -> Iterator[Tensor]:
        seen = [looks.pop()] if looks else []
        for start, logits, weights in logit_weight_rows(q, k, chunk=chunk, lengths=lengths):
            for see in seen:
                see(start, logits, weights)
            del logits
            yield weights[..., :num_keys]
            del weights

    if rows_per_chunk(q, k, chunk) >= queries:
        return _sorted(next(chunks()).flatten(2)).gather(2, rank)
    if not ratios:
        for _ in chunks():
            pass
        return torch.empty(batch, heads, 0, device=q.device)

    def bits() -> Iterator[Tensor]:
        for weights in chunks():
            yield weights.flatten(0, 1).flatten(1).view(torch.int32)  # (B * h, weights of the chunk)
            del weights

    spare = torch.tensor([rank_error * total for total in totals], device=q.device).repeat_interleave(heads)
    return _radix_select(bits, rank.flatten(0, 1).clone(), spare[:, None]).view(batch, heads, len(ratios))


@torch.no_grad()
def row_quantiles(
    q: Tensor,
    k: Tensor,
    ratios: Sequence[float],
    *,
    num_keys: int | None = None,
    lengths: Lengths | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Like `pooled_quantiles`, for every query's row apart: at most a share `ratio` of the row lies below.

    Rows are sorted whole, in chunks also for `triton`. Its mask multiplies in tiles, where a weight may have another
    last bit: its thresholds lie 2^-17 of themselves below the row's weight, which stays with what ties with it.

    Returns:
        (B, h, N, R) float32, each one of the row's weights (Triton: just below it); 0 at queries behind a sample's
        length; float64 from the dense back end.

    Raises:
        ValueError: if shapes do not agree or a ratio is outside 0 .. 1.
    """
    check_heads(q, k)
    valid, pooled = check_lengths(lengths, q, k), check_num_keys(num_keys, k.shape[2])
    ranks(ratios, 1)  # refuses ratios before any work
    chosen = choose_backend(backend, q, k)
    if chosen == "dense":
        weights = reference.attention_weights(q, k, valid)
        return reference.row_quantiles(weights, ratios, num_keys=pooled, lengths=valid)
    # Weights of invalid keys are 0, none is smaller: they only move every rank up by their number.
    counted = [pooled] * len(q) if valid is None else [min(length, pooled) for length in valid.tolist()]
    wanted = [[pooled - total + r for r in ranks(ratios, total)] for total in counted]
    rank = torch.tensor(wanted, dtype=torch.int64, device=q.device)[:, None, None]  # (B, 1, 1, R)
    found = torch.empty(*q.shape[:3], len(ratios), device=q.device)
    for start, rows in weight_rows(q, k, chunk=chunk, lengths=valid):
        ordered = _sorted(rows[..., :pooled])
        found[:, :, start : start + rows.shape[2]] = ordered.gather(3, rank.expand(*rows.shape[:3], -1))
    return found.mul_(1 - _ROUNDING) if chosen == "triton" else found


def _sorted(values: Tensor) -> Tensor:
    if values.device.type == "cpu":  # numpy's vectorised sort is ten times as fast as torch's on a CPU
        return torch.from_numpy(np.sort(values.numpy(), axis=-1))
    return values.sort(dim=-1).values


def _radix_select(bits: Callable[[], Iterator[Tensor]], rank: Tensor, spare: Tensor) -> Tensor:
    """The order statistics `rank` (heads, R) of each head over all float32 bit patterns that `bits()` yields.

    Stops after the first pass where every bin holds at most `spare` (heads, 1) weights.
    """
    heads, ratios = rank.shape
    counts = torch.zeros(heads, 1, 1 << _TOP, dtype=torch.int64, device=rank.device)
    for chunk in bits():
        for head in range(heads):  # up to the largest: half of all bins where none is above 1
            found = torch.bincount(_leading(chunk[head], _REST))
            counts[head, 0, : len(found)] += found
        del chunk
    prefix, rank, held = _choose(counts, torch.zeros_like(rank), rank)
    left = _REST
    while left and bool((held > spare).any()):
        digit = left if heads * ratios << left <= _COUNTS else min(left, 8)
        slots, slot = _slots(prefix)
        counts = torch.zeros(heads, slots.shape[1], 1 << digit, dtype=torch.int64, device=rank.device)
        wanted = torch.zeros(heads, 1 << _TOP, dtype=torch.bool, device=rank.device)
        wanted.scatter_(1, prefix >> (_REST - left), True)
        for chunk in bits():
            for head in range(heads):
                near = chunk[head][wanted[head].index_select(0, _leading(chunk[head], _REST))]
                _count_digit(near, slots[head], left, digit, counts[head])
            del chunk
        chosen, rank, held = _choose(counts, slot, rank)
        prefix, left = (prefix << digit) | chosen, left - digit
    return (prefix << left).to(torch.int32).view(torch.float32)


def _leading(bits: Tensor, below: int) -> Tensor:
    """The bits above the lowest `below` ones, without the sign: a NaN may carry one."""
    return (bits >> below) & ((1 << (31 - below)) - 1)


def _slots(prefix: Tensor) -> tuple[Tensor, Tensor]:
    """Each head's distinct prefixes (heads, R) ascending, filled up with the largest integer; each one's place."""
    ordered, order = prefix.sort(dim=1)
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    place = new.cumsum(dim=1) - 1
    slots = torch.full_like(ordered, torch.iinfo(ordered.dtype).max).scatter(1, place, ordered)
    return slots, torch.empty_like(place).scatter(1, order, place)


def _count_digit(bits: Tensor, slots: Tensor, left: int, digit: int, counts: Tensor) -> None:
    """Adds to `counts` (slots, 2^digit) the next digit of those `bits` whose leading part is one of `slots`."""
    leading = _leading(bits, left).long()
    slot = torch.searchsorted(slots, leading).clamp(max=len(slots) - 1)
    inside = slots[slot] == leading
    value = (bits >> (left - digit)) & ((1 << digit) - 1)
    index = ((slot << digit) + value)[inside]
    if index.numel() < counts.numel():  # the usual case: few weights, many bins
        counts.view(-1).scatter_add_(0, index, torch.ones_like(index))
    else:
        counts += torch.bincount(index, minlength=counts.numel()).view(counts.shape)


def _choose(counts: Tensor, slot: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bin that holds each rank within its slot, (heads, R), the rank inside that bin, and the bin's count."""
    below = counts.cumsum(dim=-1)  # (heads, slots, digit)
    chosen, before, held = (torch.empty_like(rank) for _ in range(3))
    for ratio in range(rank.shape[1]):  # one at a time: a gathered (heads, R, digit) would be large
        own = below.gather(1, slot[:, ratio, None, None].expand(-1, 1, below.shape[-1]))[:, 0]
        at = torch.searchsorted(own, rank[:, ratio, None].contiguous(), right=True)
        chosen[:, ratio] = at[:, 0]
        before[:, ratio] = torch.where(at > 0, own.gather(1, (at - 1).clamp(min=0)), 0)[:, 0]
        held[:, ratio] = own.gather(1, at)[:, 0] - before[:, ratio]
    return chosen, rank - before, held
