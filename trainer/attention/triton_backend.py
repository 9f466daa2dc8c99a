"""Statistics, quantiles and masked attention by the Triton kernels; the public functions check what comes in.

Thresholds are found in t = log2 A by counting, exactly, how many of all weights lie below some edges, and moving the
edges. A sample of the weights gives the first edges; each count then shifts the share at which the sample is read by
what was missed, so that two passes are usual. The counts bound the rank error: it is known, not estimated.

Legend: B batch, N tokens (queries and keys), h heads, d head width, R ratios, E eps values.
"""

import math
import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from trainer.attention import triton_kernels as kernels
from trainer.attention.rows import counted_weights

_LOG2E = 1 / math.log(2)
#: Rows and keys of the sample from which the first edges are taken.
_SAMPLE = 1024
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


def keys(
    q: Tensor, k: Tensor, lse: Tensor, lengths: Tensor | None, *, eps: Sequence[float] = (),
    edges: Tensor | None = None, num_keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One pass over all weights.

    Args:
        q: (B, h, N, d).
        k: (B, h, N, d).
        lse: (B, h, N) in base 2, of `rows`.
        lengths: (B,) or None.
        eps: E values; none skips column sums too.
        edges: (B, h, J) in t; None for none.
        num_keys: edges are counted over so many leading keys.

    Returns:
        Column sums (B, h, N) float32, counts of A > eps (B, h, E, N) int32, counts of t > edge (B, h, J) int64.
    """
    q, k = _inner(q, k)
    batch, heads, tokens = q.shape[:3]
    order = sorted(range(len(eps)), key=lambda index: eps[index])
    found = {
        "mass": torch.zeros(batch, heads, tokens if eps else 1, device=q.device),
        "heavy": torch.zeros(batch, heads, max(len(eps), 1), tokens if eps else 1, dtype=torch.int32, device=q.device),
    }
    wanted = torch.zeros(batch, heads, 1, device=q.device) if edges is None else edges.float().contiguous()
    above = torch.zeros(wanted.shape, dtype=torch.int64, device=q.device)
    logs = torch.tensor([eps[i] for i in order] or [1.0], dtype=torch.float64).log2().float().to(q.device)
    valid, how = _lengths(lengths, q), _launch(q, "key")
    counted = valid if num_keys is None else valid.clamp(max=num_keys)
    kernels.key_kernel[_grid(tokens, how["BN"], q)](
        q, k, lse, found["mass"], found["heavy"], above, logs, wanted, valid, counted,
        q.shape[-1] ** -0.5 * _LOG2E, tokens, heads, *_strides(q, k),
        WITH_MASS=bool(eps), E=len(eps), J=0 if edges is None else wanted.shape[-1], **how,
    )  # fmt: skip
    back = torch.empty(len(eps), dtype=torch.int64)
    back[order] = torch.arange(len(eps))
    return found["mass"], found["heavy"][:, :, back.to(q.device)] if eps else found["heavy"], above


def quantiles(
    q: Tensor, k: Tensor, ratios: Sequence[float], num_keys: int, lengths: Tensor | None, rank_error: float
) -> Tensor:
    """Thresholds (B, h, R) float32; at most a share r of the weights lies below, and more than r - rank_error of them
    unless ties forbid it."""
    lse, top, _ = rows(q, k, lengths, entropy=False)
    totals = torch.tensor(counted_weights(q, k, num_keys, lengths), dtype=torch.float64, device=q.device)[:, None, None]
    want = torch.tensor(ratios, dtype=torch.float64, device=q.device).expand(*q.shape[:2], -1)
    sample = _sample(q, k, lse, num_keys, lengths)
    # Between two edges, of which the lower has at most r below or at it and the upper more.
    low = torch.full_like(want, -200.0).float()
    high = top.amax(dim=-1, keepdim=True).expand_as(low).clone()
    at, done = want - rank_error / 2, want <= 0
    for turn in range(_PASSES):
        middle = low / 2 + high / 2
        edge = _read(sample, at) if turn < _GUESSES else middle
        edge = torch.where((edge > low) & (edge < high), edge, middle)
        below = 1 - keys(q, k, lse, lengths, edges=edge, num_keys=num_keys)[2] / totals
        fits = below <= want
        low, high = torch.where(fits & ~done, edge, low), torch.where(fits | done, high, edge)
        done = done | (fits & (below >= want - rank_error)) | (torch.nextafter(low, high) >= high)
        if bool(done.all()):
            break
        at = at + (want - rank_error / 2 - below)
    # What is below or at the edge is below its successor.
    limits = torch.exp2(torch.nextafter(low, high))
    largest = torch.exp2(top.amax(dim=-1, keepdim=True)).expand_as(limits)
    limits = torch.where(want >= 1, largest, limits)
    return torch.where(want <= 0, torch.zeros_like(limits), limits)


def _sample(q: Tensor, k: Tensor, lse: Tensor, num_keys: int, lengths: Tensor | None) -> Tensor:
    """Sorted t (B, h, S) of evenly spread queries and keys."""
    picked = []
    for b in range(q.shape[0]):
        length = q.shape[2] if lengths is None else int(lengths[b])
        i = torch.linspace(0, length - 1, min(_SAMPLE, length), device=q.device).long()
        j = torch.linspace(0, min(num_keys, length) - 1, _SAMPLE, device=q.device).long()
        t = (q[b, :, i].float() @ k[b, :, j].float().mT) * (q.shape[-1] ** -0.5 * _LOG2E) - lse[b, :, i, None]
        picked.append(t.flatten(1))
    least = min(t.shape[1] for t in picked)
    return torch.stack([t[:, :: max(1, t.shape[1] // least)][:, :least].sort(dim=-1).values for t in picked])


def _read(sample: Tensor, share: Tensor) -> Tensor:
    """The sample's quantiles, (B, h, R)."""
    place = (share * sample.shape[-1]).long().clamp(0, sample.shape[-1] - 1)
    return sample.gather(-1, place)


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
