"""Pooled quantiles of the Triton back end: thresholds in t = log2 A, moved until exact counts fit.

Each pass counts, exactly, how many of all weights lie above some edges. A sample of the weights gives the first edges,
which miss their shares by about a thousandth. How far an edge must move for that is read off the sample's density,
known to a few per cent, so one pass over all weights is usual; where three standard errors of it exceed the rank error
asked for, the moved edges are counted too. Where many weights tie, no edge meets the share, and the sample names the
tied weight up to rounding: edges close to it are counted until no other float32 weight is left between two of them.

Legend: B batch, N tokens (queries and keys), h heads, R ratios, E eps values, n weights of a head in the sample.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.attention.inputs import Inputs, threshold_ranks
from trainer.attention.triton_launch import key_pass, sample_pass, valid_tokens

#: The sample's density about a threshold is taken over this share on either side.
_WINDOW = 0.02
#: Passes after which an interval is halved instead of being read off the sample, and after which it is given up.
_GUESSES, _PASSES = 4, 48
#: Least step in t beside an edge: near t = 0 smaller ones give the same float32 weight, and `EDGE_SCALE` blurs them.
_LEAST_STEP = 2.0**-25
#: By which each further step from the same side is larger.
_STEP_GROWTH = 16.0


def pooled_quantiles(
    x: Inputs, ratios: Sequence[float], rank_error: float, *, lse: Tensor, top: Tensor,
    eps: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Thresholds below which a share r of the weights lies, to `rank_error` on either side unless ties forbid it.

    Args:
        x: the layer.
        ratios: R values.
        rank_error: a share.
        lse: (B, h, N) log-sum-exp in base 2, of `row_pass`.
        top: (B, h, N) t of each row's largest weight, of `row_pass`.
        eps: E values that the first pass also counts; None: it does not.

    Returns:
        Thresholds (B, h, R) float32, and column sums and counts as of `key_pass`.
    """
    wanted = torch.tensor(ratios, dtype=torch.float64, device=x.q.device).expand(*x.q.shape[:2], -1)
    if not ratios:
        return wanted.float(), *key_pass(x, lse, eps=eps)[:2]
    sizes = x.pool_sizes()
    totals = torch.tensor(sizes, dtype=torch.float64, device=x.q.device)[:, None, None]
    # Whole weights, of the decimal: 1 - 0.7 as a float is above 0.3. At a ratio of 1 all but the largest, exactly.
    goals = torch.tensor([threshold_ranks(ratios, size) for size in sizes], dtype=torch.float64, device=x.q.device)
    goals, error = goals[:, None], torch.where(wanted >= 1, 0.0, rank_error)
    sample = sample_pass(x, lse)
    padding = torch.arange(x.q.shape[2], device=x.q.device) >= valid_tokens(x)[:, None, None]
    largest = top.masked_fill(padding, -torch.inf).amax(dim=-1, keepdim=True)
    # Edges on either side of the threshold: at most r of the weights lie below or at the lower one, more at the upper.
    low, high = torch.full_like(wanted, -200.0).float(), largest.expand(wanted.shape).clone()
    above_low, above_high = totals.expand(wanted.shape), torch.zeros_like(wanted)
    is_largest = (wanted >= 1) & (x.num_keys >= x.q.shape[2])  # known from the rows
    limit, share, done = low.clone(), wanted, (wanted <= 0) | is_largest | high.isnan()  # with NaN nothing is above
    steps = torch.ones(2, *low.shape, device=low.device)
    for turn in range(_PASSES):
        guess = _sample_quantiles(sample, share)
        if turn == 0:  # the only pass as a rule: nothing is counted yet that a guess could repeat
            edge = torch.where((guess > low) & (guess < high), guess, low / 2 + high / 2)
        else:
            edge, steps = _next_edge(guess, low, high, steps, halve=turn >= _GUESSES)
        found = key_pass(x, lse, eps=eps if turn == 0 else None, edges=edge)
        if turn == 0:
            mass, counts = found[:2]
        above = found[2].double()
        missing = (goals - (totals - above)) / totals
        is_lower = missing >= 0
        low, high = torch.where(is_lower, edge, low), torch.where(is_lower, high, edge)
        above_low, above_high = torch.where(is_lower, above, above_low), torch.where(is_lower, above_high, above)
        moved, uncertainty = _moved(sample, share, edge, missing, totals)
        met, sure = missing.abs() <= error, (uncertainty <= error) & (moved >= low) & (moved < high)
        one_value = torch.exp2(torch.nextafter(low, high)) >= torch.exp2(high)  # of all float32 weights in between
        exact = one_value | (above_low - above_high <= 1)
        limit = torch.where(done, limit, torch.where(met, edge, torch.where(sure, moved, low)))
        done = done | met | sure | exact
        if bool(done.all()):
            break
        share = _next_share(sample, share, edge, missing, totals)
    # What is below or at an edge is below its successor.
    limits = torch.exp2(torch.nextafter(limit, torch.full_like(limit, torch.inf)))
    limits = torch.where(is_largest, torch.exp2(largest), limits)
    return torch.where(wanted <= 0, 0.0, limits), mass, counts


def _sample_quantiles(sample: Tensor, share: Tensor) -> Tensor:
    """Quantiles (B, h, R) of the ascending sample (B, h, n) at `share` (B, h, R)."""
    index = (share * sample.shape[-1]).long().clamp(0, sample.shape[-1] - 1)
    return sample.gather(-1, index)


def _next_share(sample: Tensor, share: Tensor, edge: Tensor, missing: Tensor, totals: Tensor) -> Tensor:
    """Where in the sample the threshold is, after all weights were counted at an edge: (B, h, R), as the edges are.

    That is `missing` from the edge's place, which is the upper end of weights that tie with it. Beside a weight of the
    sample that rounds otherwise than the tiles, the edge's place is one weight off: `missing` is taken as one less.
    """
    size = sample.shape[-1]
    before, after = (torch.searchsorted(sample, edge, right=right).double() for right in (False, True))
    place = torch.where(after - before > 1, after, torch.clamp(share * size, before, after))
    one = (1 / totals).clamp(min=1 / size)
    return place / size + torch.where(after > before, missing, missing - torch.clamp(missing, -one, one))


def _next_edge(guess: Tensor, low: Tensor, high: Tensor, steps: Tensor, *, halve: bool) -> tuple[Tensor, Tensor]:
    """The edge to count next, between `low` and `high`, and the next steps (2, B, h, R) from either, in ulps.

    A guess that is at or beyond a counted edge means ties there, or a sample that rounds otherwise than the tiles: the
    edge beside that one comes next, then edges further and further from it. A guess in between is taken, or, to
    `halve`, the middle.
    """
    middle, beyond = low / 2 + high / 2, torch.stack([guess <= low, guess >= high])
    size = torch.where(beyond[0], low, high).abs()
    step = (torch.nextafter(size, torch.full_like(size, torch.inf)) - size).clamp(min=_LEAST_STEP)
    edge = torch.where((guess > low) & (guess < high) & (not halve), guess, middle)
    edge = torch.where(beyond[0], torch.minimum(low + steps[0] * step, middle), edge)
    edge = torch.where(beyond[1], torch.maximum(high - steps[1] * step, middle), edge)
    return edge, torch.where(beyond, steps * _STEP_GROWTH, steps)


def _moved(sample: Tensor, share: Tensor, edge: Tensor, missing: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Where edges must go to have `missing` more of the weights below them, and how wrong the share may then still be.

    Extrapolates the sample's quantiles about `share` to second order. The uncertainty is three standard errors of the
    sample's density and of how many of all weights lie in the gap, and the second-order term. All are (B, h, R).
    """
    centre = share.clamp(_WINDOW, 1 - _WINDOW)
    before, here, after = (_sample_quantiles(sample, centre + side).double() for side in (-_WINDOW, 0.0, _WINDOW))
    slope, curvature = (after - before) / (2 * _WINDOW), (after - 2 * here + before) / _WINDOW**2
    moved = edge + slope * missing + curvature / 2 * missing.square()
    noise = 3 / math.sqrt(2 * _WINDOW * sample.shape[-1])
    uncertainty = (
        missing.abs() * noise
        + 3 * (missing.abs() / totals).sqrt()
        + (curvature / 2).abs() / slope * missing.square()
    )  # fmt: skip
    return moved.float(), uncertainty.where(slope > 0, torch.inf)
