"""Statistics, quantiles and masked attention by the Triton kernels; the public functions check what comes in.

Thresholds are found in t = log2 A by counting, exactly, how many of all weights lie below some edges, and moving the
edges. A sample of the weights gives the first edges, which miss their shares by about a thousandth. How far they must
move for that is read off the sample's density, known to a few per cent, so one pass over all weights is usual; where
three standard errors of it exceed the rank error asked for, the moved edges are counted too.

Legend: B batch, N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

import math
import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from trainer.attention import triton_kernels as kernels
from trainer.attention.rows import counted_weights, shares

_LOG2E = 1 / math.log(2)
#: Weights of a head in the sample from which the first edges are taken.
_SAMPLE = 2**18
#: The sample's density about a threshold is taken over this share on either side.
_WINDOW = 0.02
_GOLDEN = (math.sqrt(5) - 1) / 2
#: Passes after which an interval is halved instead of being read off the sample, and after which it is given up.
_GUESSES, _PASSES = 4, 48

#: In t: weights so close to their row's largest count as it.
_SLACK = 2.0**-16

#: Queries and keys of a tile, warps and pipeline stages: the fastest of those tried on an H200 at d = 128 in bfloat16.
_TILES = {"row": (128, 128, 8, 2), "key": (128, 64, 4, 3), "masked": (64, 64, 4, 3)}


def _launch(q: Tensor, kind: str) -> dict[str, object]:
    """Tile sizes and launch options. float32 products take no tensor cores, and the interpreter no large tiles."""
    native = q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1"
    rows, keys, warps, stages = _TILES[kind] if native and q.dtype != torch.float32 else (32, 32, 4, 2)
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    sizes = {"D": q.shape[-1], "BD": width, "BM": rows, "BN": keys, "NATIVE": native}
    return sizes | ({"num_warps": warps, "num_stages": stages} if native else {})


def _strides(*tensors: Tensor) -> list[int]:
    return [tensor.stride(axis) for tensor in tensors for axis in range(3)]


def _grid(tokens: int, block: object, q: Tensor) -> tuple[int, int]:
    return triton.cdiv(tokens, block), q.shape[0] * q.shape[1]


def _lengths(lengths: Tensor | None, q: Tensor) -> Tensor:
    if lengths is None:
        return torch.full((q.shape[0],), q.shape[2], dtype=torch.int32, device=q.device)
    return lengths.to(torch.int32)


def _inner(*tensors: Tensor) -> list[Tensor]:
    """The kernels read the last axis in steps of one, and place tokens of a head by 32-bit integers."""
    fit = [t.stride(-1) == 1 and t.shape[2] * t.stride(2) < 2**31 for t in tensors]
    return [tensor if fits else tensor.contiguous() for tensor, fits in zip(tensors, fit, strict=True)]


def rows(q: Tensor, k: Tensor, lengths: Tensor | None, *, entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Per query (B, h, N) float32: log-sum-exp in base 2, t of the largest weight, entropy in nats (0 if not asked)."""
    q, k = _inner(q, k)
    lse, top, spread = (torch.zeros(q.shape[:3], device=q.device) for _ in range(3))
    how = _launch(q, "row")
    scale = q.shape[-1] ** -0.5 * _LOG2E
    kernels.row_kernel[_grid(q.shape[2], how["BM"], q)](
        q, k, lse, top, spread, _lengths(lengths, q), scale, q.shape[2], q.shape[1], *_strides(q, k),
        WITH_ENTROPY=entropy, **how,
    )  # fmt: skip
    return lse, top * scale - lse, spread


def row_results(lse: Tensor, top: Tensor, entropy: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `rows` gives as natural log-sum-exp, largest weight and entropy; 0 behind a sample's length."""
    maximum = top.exp2()
    if lengths is not None:
        maximum.masked_fill_(torch.arange(top.shape[2], device=top.device) >= lengths[:, None, None], 0.0)
    return lse * math.log(2), maximum, entropy


def keys(
    q: Tensor, k: Tensor, lse: Tensor, lengths: Tensor | None, *, eps: Sequence[float] | None = None,
    edges: Tensor | None = None, num_keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One pass over all weights.

    Args:
        q: (B, h, N, d).
        k: (B, h, N, d).
        lse: (B, h, N) in base 2, of `rows`.
        lengths: (B,) or None.
        eps: E values; None: neither column sums nor counts are wanted, and both come back empty.
        edges: (B, h, J) in t; None for none.
        num_keys: edges are counted over so many leading keys.

    Returns:
        Column sums (B, h, N) float32, counts of A > eps (B, h, E, N) int32, counts of t > edge (B, h, J) int64.
    """
    q, k = _inner(q, k)
    batch, heads, tokens = q.shape[:3]
    order = sorted(range(len(eps or ())), key=lambda index: (eps or ())[index])
    size = 0 if eps is None else tokens
    mass = torch.zeros(batch, heads, size, device=q.device)
    heavy = torch.zeros(batch, heads, len(order), size, dtype=torch.int32, device=q.device)
    wanted = torch.zeros(batch, heads, 0, device=q.device) if edges is None else edges.float().contiguous()
    above = torch.zeros(wanted.shape, dtype=torch.int64, device=q.device)
    logs = torch.tensor([(eps or ())[i] for i in order], dtype=torch.float64).log2().float().to(q.device)
    valid, how = _lengths(lengths, q), _launch(q, "key")
    counted = valid if num_keys is None else valid.clamp(max=num_keys)
    kernels.key_kernel[_grid(tokens, how["BN"], q)](
        q, k, lse, mass, heavy, above, logs, wanted, valid, counted,
        q.shape[-1] ** -0.5 * _LOG2E, tokens, heads, *_strides(q, k),
        WITH_MASS=eps is not None, E=len(order), J=wanted.shape[-1], **how,
    )  # fmt: skip
    back = torch.empty(len(order), dtype=torch.int64)
    back[order] = torch.arange(len(order))
    return mass, heavy[:, :, back.to(q.device)], above


def quantiles(
    q: Tensor, k: Tensor, ratios: Sequence[float], num_keys: int, lengths: Tensor | None, rank_error: float, *,
    lse: Tensor, top: Tensor, eps: Sequence[float] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Thresholds below which a share r of the weights lies, to `rank_error` on either side unless ties forbid it.

    Args:
        q: (B, h, N, d).
        k: (B, h, N, d).
        ratios: R values.
        num_keys: weights on so many leading keys are pooled.
        lengths: (B,) or None.
        rank_error: a share.
        lse: (B, h, N) in base 2, of `rows`.
        top: (B, h, N) likewise.
        eps: E values that the first pass also counts; None: it does not.

    Returns:
        Thresholds (B, h, R) float32, and column sums and counts as of `keys`.
    """
    counted = counted_weights(q, k, num_keys, lengths)
    totals = torch.tensor(counted, dtype=torch.float64, device=q.device)[:, None, None]
    want = torch.tensor(ratios, dtype=torch.float64, device=q.device).expand(*q.shape[:2], -1)
    # Whole weights, of the decimal: 1 - 0.7 as a float is above 0.3. At a ratio of 1 all but the largest, exactly.
    goals = torch.tensor([shares(ratios, total) for total in counted], dtype=torch.float64, device=q.device)[:, None]
    goals, error = torch.minimum(goals, totals - 1), torch.where(want >= 1, 0.0, rank_error)
    if not ratios:
        return want.float(), *keys(q, k, lse, lengths, eps=eps)[:2]
    sample = _sample(q, k, lse, num_keys, lengths)
    behind = torch.arange(q.shape[2], device=q.device) >= _lengths(lengths, q)[:, None, None]
    largest = top.masked_fill(behind, -torch.inf).amax(dim=-1, keepdim=True)
    # Between two edges, of which the lower has at most r below or at it and the upper more.
    low, high = torch.full_like(want, -200.0).float(), largest.expand(want.shape).clone()
    above_low, above_high = totals.expand(want.shape), torch.zeros_like(want)
    known = (want >= 1) & (num_keys >= q.shape[2])
    limit, at, done = low.clone(), want, (want <= 0) | known
    for turn in range(_PASSES):
        middle = low / 2 + high / 2
        edge = _read(sample, at) if turn < _GUESSES else middle
        edge = torch.where((edge > low) & (edge < high), edge, middle)
        found = keys(q, k, lse, lengths, eps=eps if turn == 0 else None, edges=edge, num_keys=num_keys)
        if turn == 0:
            mass, heavy = found[:2]
        above = found[2].double()
        missing = (goals - (totals - above)) / totals
        fits = missing >= 0
        low, high = torch.where(fits, edge, low), torch.where(fits, high, edge)
        above_low, above_high = torch.where(fits, above, above_low), torch.where(fits, above_high, above)
        moved, doubt = _shift(sample, at, edge, missing, totals)
        met, sure = missing.abs() <= error, (doubt <= error) & (moved >= low) & (moved < high)
        exact = (torch.nextafter(low, high) >= high) | (above_low - above_high <= 1)  # none, or one weight, is between
        limit = torch.where(done, limit, torch.where(met, edge, torch.where(sure, moved, low)))
        done = done | met | sure | exact
        if bool(done.all()):
            break
        at = at + missing
    # What is below or at an edge is below its successor.
    limits = torch.exp2(torch.nextafter(limit, torch.full_like(limit, torch.inf)))
    limits = torch.where(known, torch.exp2(largest), limits)
    return torch.where(want <= 0, 0.0, limits), mass, heavy


def _sample(q: Tensor, k: Tensor, lse: Tensor, num_keys: int, lengths: Tensor | None) -> Tensor:
    """Sorted t (B, h, n) of weights spread evenly over the queries and the keys that count: a lattice, the same for
    all heads."""
    batch, heads, tokens = q.shape[:3]
    valid = _lengths(lengths, q)[:, None]
    size = min(_SAMPLE, tokens * num_keys)
    if lengths is None and size < _SAMPLE:  # all there are
        every = torch.arange(size, device=q.device)
        i, j = (part.expand(batch, -1) for part in (every // num_keys, every % num_keys))
    else:
        turn = torch.arange(size, dtype=torch.float64, device=q.device) + 0.5
        i, j = turn / size * valid, (turn * _GOLDEN).frac() * valid.clamp(max=num_keys)
    i, j = (part.to(torch.int32).contiguous() for part in (i, j))
    t = torch.empty(batch, heads, size, device=q.device)
    how = _launch(q, "row")
    pairs = 64 if how["NATIVE"] else 2048
    kernels.sample_kernel[_grid(size, pairs, q)](
        q, k, lse, t, i, j, q.shape[-1] ** -0.5 * _LOG2E, size, tokens, heads, *_strides(q, k),
        D=how["D"], BD=how["BD"], BP=pairs,
    )  # fmt: skip
    return t.sort(dim=-1).values


def _read(sample: Tensor, share: Tensor) -> Tensor:
    """The sample's quantiles, (B, h, R)."""
    place = (share * sample.shape[-1]).long().clamp(0, sample.shape[-1] - 1)
    return sample.gather(-1, place)


def _shift(
    sample: Tensor, share: Tensor, edge: Tensor, missing: Tensor, totals: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Where an edge must go to have another share of the weights below it, by the sample's quantiles about `share`;
    and by how much the share may then still be wrong: three standard errors of the sample's density and of how many of
    all weights lie in the gap, and the bend."""
    centre = share.clamp(_WINDOW, 1 - _WINDOW)
    before, here, after = (_read(sample, centre + side).double() for side in (-_WINDOW, 0.0, _WINDOW))
    slope, bend = (after - before) / (2 * _WINDOW), (after - 2 * here + before) / _WINDOW**2
    moved = edge + slope * missing + bend / 2 * missing.square()
    noise = 3 / math.sqrt(2 * _WINDOW * sample.shape[-1])
    doubt = missing.abs() * noise + 3 * (missing.abs() / totals).sqrt() + (bend / 2).abs() / slope * missing.square()
    return moved.float(), doubt.where(slope > 0, torch.inf)


def masked(
    q: Tensor, k: Tensor, v: Tensor, thresholds: Tensor, num_keys: int, lengths: Tensor | None, *,
    renormalise: bool, tail: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `masking.masked_attention`; thresholds (B, h) or (B, h, N)."""
    q, k, v = _inner(q, k, v)
    lse, top, _ = rows(q, k, lengths, entropy=False)
    limits = thresholds.float().clamp(min=0).log2()
    # A row's largest weight stays; another tile size may round its product otherwise, hence the slack.
    limits = torch.minimum(limits if limits.ndim == 3 else limits[..., None], top - _SLACK).contiguous()
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=q.device)
    removed = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    dropped = torch.zeros(q.shape[:2], device=q.device)
    valid, how = _lengths(lengths, q), _launch(q, "masked")
    kernels.masked_kernel[_grid(q.shape[2], how["BM"], q)](
        q, k, v, out, lse, limits, removed, dropped, valid, valid.clamp(max=num_keys), q.shape[-1] ** -0.5 * _LOG2E,
        q.shape[2], q.shape[1], *_strides(q, k, v, out), RENORMALISE=renormalise, TAIL=tail, **how,
    )  # fmt: skip
    removable = torch.tensor(counted_weights(q, k, num_keys, lengths), dtype=torch.float32, device=q.device)
    return out, removed.float() / removable[:, None], dropped / valid[:, None]
