"""Launches of the Triton kernels: each function is one pass over a layer's weights, which are never stored.

Weights are in t = log2 A, so 0 is the largest possible.

Legend: B batch, N tokens (queries and keys), h heads, d head width, E eps values, J edges.
"""

import math
import os
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from trainer.attention import triton_kernels as kernels
from trainer.attention.inputs import Inputs

#: Most weights of a head that `sample_pass` takes.
_SAMPLE = 2**18
_GOLDEN = (math.sqrt(5) - 1) / 2

#: Queries and keys of a tile, warps and pipeline stages: the fastest of those tried on an H200 at d = 128 in bfloat16.
_TILES = {"row": (128, 128, 8, 2), "key": (128, 64, 4, 3), "masked": (64, 64, 4, 3)}
#: The same for float32, whose products take no tensor cores.
_SMALL_TILE = (32, 32, 4, 2)
#: The same for the interpreter, which takes as long for smaller tiles. With few tokens tests still have several tiles
#: in both directions, and as a tile is not square they see where queries take the place of keys.
_INTERPRETED_TILE = (32, 64, 1, 1)


def row_pass(x: Inputs, *, entropy: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Per query, (B, h, N) float32 each: log-sum-exp in base 2, t of the largest weight, entropy in nats.

    Entropies are 0 if not asked for.
    """
    q, k = _readable(x.q, x.k)
    lse, top, entropies = (torch.zeros(q.shape[:3], device=q.device) for _ in range(3))
    options, scale = _options(q, "row"), _scale(q)
    kernels.row_kernel[_grid(q.shape[2], options["BM"], q)](
        q, k, lse, top, entropies, valid_tokens(x), scale, q.shape[2], q.shape[1], *_strides(q, k),
        WITH_ENTROPY=entropy, **options,
    )  # fmt: skip
    return lse, top * scale - lse, entropies


def key_pass(
    x: Inputs, lse: Tensor, *, eps: Sequence[float] | None = None, edges: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Column sums and counts.

    Args:
        x: the layer; edges are counted over its leading `num_keys` keys only.
        lse: (B, h, N) in base 2, of `row_pass`.
        eps: E values; None: neither column sums nor counts are wanted, and both come back empty.
        edges: (B, h, J) in t; None for none.

    Returns:
        Column sums (B, h, N) float32, counts of A > eps (B, h, E, N) int32, counts of t > edge (B, h, J) int64.
    """
    q, k = _readable(x.q, x.k)
    batch, heads, tokens = q.shape[:3]
    values = () if eps is None else tuple(eps)
    order = sorted(range(len(values)), key=lambda index: values[index])
    size = 0 if eps is None else tokens
    mass = torch.zeros(batch, heads, size, device=q.device)
    heavy = torch.zeros(batch, heads, len(order), size, dtype=torch.int32, device=q.device)
    wanted = torch.zeros(batch, heads, 0, device=q.device) if edges is None else edges.float().contiguous()
    above = torch.zeros(wanted.shape, dtype=torch.int64, device=q.device)
    logs = torch.tensor([values[i] for i in order], dtype=torch.float64).log2().float().to(q.device)
    valid, options = valid_tokens(x), _options(q, "key")
    kernels.key_kernel[_grid(tokens, options["BN"], q)](
        q, k, lse, mass, heavy, above, logs, wanted, valid, valid.clamp(max=x.num_keys), _scale(q), tokens, heads,
        *_strides(q, k), WITH_MASS=eps is not None, E=len(order), J=wanted.shape[-1], **options,
    )  # fmt: skip
    back = torch.empty(len(order), dtype=torch.int64)
    back[order] = torch.arange(len(order))
    return mass, heavy[:, :, back.to(q.device)], above


def sample_pass(x: Inputs, lse: Tensor) -> Tensor:
    """t (B, h, n) ascending of weights spread evenly over the queries and the keys that count.

    The sample is a lattice of (query, key) pairs, the same for all heads; all weights if they are no more than n.
    """
    q, k = _readable(x.q, x.k)
    batch, heads, tokens = q.shape[:3]
    device, valid = q.device, valid_tokens(x)[:, None]
    size = min(_SAMPLE, tokens * x.num_keys)
    if x.lengths is None and size < _SAMPLE:
        every = torch.arange(size, device=device)
        i, j = (part.expand(batch, -1) for part in (every // x.num_keys, every % x.num_keys))
    else:
        turn = torch.arange(size, dtype=torch.float64, device=device) + 0.5
        i, j = turn / size * valid, (turn * _GOLDEN).frac() * valid.clamp(max=x.num_keys)
    i, j = (part.to(torch.int32).contiguous() for part in (i, j))
    t = torch.empty(batch, heads, size, device=device)
    options = _options(q, "row")
    pairs = 64 if options["NATIVE"] else 2048
    kernels.sample_kernel[_grid(size, pairs, q)](
        q, k, lse, t, i, j, _scale(q), size, tokens, heads, *_strides(q, k), D=options["D"], BD=options["BD"], BP=pairs
    )
    return t.sort(dim=-1).values


def masked_pass(
    x: Inputs, v: Tensor, lse: Tensor, limits: Tensor, *, renormalise: bool, mean_tail: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention without weights below `limits`, (B, h, N) in t, on keys before `num_keys`.

    Returns:
        Output (B, h, N, d), number of removed weights (B, h) int64, their sum (B, h) float32.
    """
    q, k, v = _readable(x.q, x.k, v)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype, device=q.device)
    removed = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device)
    dropped = torch.zeros(q.shape[:2], device=q.device)
    valid, options = valid_tokens(x), _options(q, "masked")
    kernels.masked_kernel[_grid(q.shape[2], options["BM"], q)](
        q, k, v, out, lse, limits, removed, dropped, valid, valid.clamp(max=x.num_keys), _scale(q),
        q.shape[2], q.shape[1], *_strides(q, k, v, out), RENORMALISE=renormalise, TAIL=mean_tail, **options,
    )  # fmt: skip
    return out, removed, dropped


def valid_tokens(x: Inputs) -> Tensor:
    """Valid tokens of each sample, (B,) int32."""
    if x.lengths is None:
        return torch.full((x.q.shape[0],), x.q.shape[2], dtype=torch.int32, device=x.q.device)
    return x.lengths.to(torch.int32)


def _scale(q: Tensor) -> float:
    """log2(e) / sqrt(d): logits times it are in base 2."""
    return q.shape[-1] ** -0.5 * (1 / math.log(2))


def launch_shape(kind: str, *, float32: bool) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and stages of the kernel `row`, `key` or `masked` on a GPU."""
    return _SMALL_TILE if float32 else _TILES[kind]


def _options(q: Tensor, kind: str) -> dict[str, object]:
    """Tile sizes and launch options."""
    native = q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1"
    tile = launch_shape(kind, float32=q.dtype == torch.float32) if native else _INTERPRETED_TILE
    rows, keys, warps, stages = tile
    width = max(16, triton.next_power_of_2(q.shape[-1]))
    sizes = {"D": q.shape[-1], "BD": width, "BM": rows, "BN": keys, "NATIVE": native}
    return sizes | ({"num_warps": warps, "num_stages": stages} if native else {})


def _strides(*tensors: Tensor) -> list[int]:
    return [tensor.stride(axis) for tensor in tensors for axis in range(3)]


def _grid(tokens: int, block: object, q: Tensor) -> tuple[int, int]:
    return triton.cdiv(tokens, block), q.shape[0] * q.shape[1]


def _readable(*tensors: Tensor) -> list[Tensor]:
    """Copies where needed: kernels read the last axis in steps of one, and address tokens by 32-bit integers."""
    fit = [t.stride(-1) == 1 and t.shape[2] * t.stride(2) < 2**31 for t in tensors]
    return [tensor if fits else tensor.contiguous() for tensor, fits in zip(tensors, fit, strict=True)]
