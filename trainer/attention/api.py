"""The functions of the attention engine: each checks its inputs once and calls one back end.

A = softmax(Q K^T / sqrt(d)) of each sample and head. Arguments that mean the same in all functions:

    q: (B, h, N, d) queries as the softmax sees them (after norm and rotary embedding), any floating dtype.
    k: (B, h, M, d) keys in the same order of tokens, vision tokens first.
    lengths: (B,) valid tokens per sample; tokens from there on are padding, neither queries nor keys. Needs N = M.
        None: all are valid.
    backend: `dense` (float64, small N), `chunked` (float32, any device) or `triton` (CUDA); None chooses by device.
    chunk: query rows that the chunked back end holds at a time; None chooses by memory. A threshold is one of the
        weights, bit for bit, only where quantiles and mask use the same chunk.

Results are float32, of the dense back end float64, and have no gradients. All raise ValueError where shapes disagree
or a value is out of its range.

Legend: B batch, N queries, M keys, h heads, d head width, D model width, E eps values, R ratios, F latent frames,
S side of a pooled map.
"""

import importlib.util
import os
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from trainer.attention import maps, sinks
from trainer.attention.backend import Backend, LayerStatistics, RowStatistics, Tail
from trainer.attention.chunked import Chunked
from trainer.attention.dense import Dense64
from trainer.attention.inputs import Lengths, checked
from trainer.attention.sinks import EPS, SinkStatistics


def choose_backend(name: str | None, q: Tensor, k: Tensor, v: Tensor | None = None) -> Backend:
    """The back end of that name; None: `triton` on CUDA where it is installed and N = M, else `chunked`.

    Raises:
        ValueError: if there is no back end of that name, or it cannot work on these tensors.
    """
    if name not in (None, "dense", "chunked", "triton"):
        raise ValueError(f"got backend {name!r}, expected 'dense', 'chunked', 'triton' or None to have it chosen.")
    if name == "dense":
        return Dense64()
    installed = importlib.util.find_spec("triton") is not None
    square, narrow = q.shape[2] == k.shape[2], v is None or v.shape[-1] == q.shape[-1]
    if name == "chunked" or (name is None and not (q.is_cuda and installed and square and narrow)):
        return Chunked()
    if not (installed and (q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")):
        raise ValueError(
            f"got backend 'triton' for tensors on {q.device} ({'' if installed else 'not '}installed); expected CUDA, "
            "or TRITON_INTERPRET=1 in the environment to have its kernels interpreted. Use 'chunked'."
        )
    if not square:
        raise ValueError(f"got {q.shape[2]} queries and {k.shape[2]} keys, expected equally many. Use 'chunked'.")
    if v is not None and not narrow:
        raise ValueError(f"got values {v.shape[-1]} wide for heads {q.shape[-1]} wide, expected equal. Use 'chunked'.")
    from trainer.attention.triton_backend import Triton  # an optional package

    return Triton()


@torch.no_grad()
def row_statistics(
    q: Tensor, k: Tensor, *, lengths: Lengths | None = None, backend: str | None = None, chunk: int | None = None
) -> RowStatistics:
    """Log-sum-exp, largest weight and entropy of each query's row."""
    x = checked(q, k, lengths=lengths, chunk=chunk)
    return choose_backend(backend, q, k).row_statistics(x)


@torch.no_grad()
def key_statistics(
    q: Tensor,
    k: Tensor,
    *,
    eps: Sequence[float],
    lengths: Lengths | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """How much every key receives, and from how many queries it receives more than each eps.

    Further arguments:
        eps: E numbers of at least 0, in any order.
        lse: (B, h, N) `row_statistics(...).lse`, if known already: saves the Triton back end a pass.

    Returns:
        Column sums of A, (B, h, M), and counts of A > eps, (B, h, E, M) int32; 0 at padding.
    """
    x = checked(q, k, lengths=lengths, chunk=chunk, eps=eps, lse=lse)
    return choose_backend(backend, q, k).key_statistics(x, eps, lse)


@torch.no_grad()
def sink_statistics(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_vision: int,
    eps: Sequence[float] = EPS,
    projection: Tensor | None = None,
    lengths: Lengths | None = None,
    chunk: int | None = None,
    backend: str | None = None,
) -> SinkStatistics:
    """Sink statistics of one layer: exact counts over all queries, vision keys judged apart from text keys.

    Further arguments:
        v: (B, h, M, any width) values.
        num_vision: how many of the tokens are vision tokens.
        eps: E numbers of at least 0; weights above these are heavy.
        projection: (h, d, D) output projection split by head, for the projected value-norm ratio.
    """
    x = checked(q, k, v=v, lengths=lengths, chunk=chunk, eps=eps, num_vision=num_vision)
    mass, counts = choose_backend(backend, q, k).key_statistics(x, eps, None)
    return sinks.summarise(x, v, mass, counts, num_vision=num_vision, eps=eps, projection=projection)


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
    """Thresholds below which at most a share `ratio` of a head's weights lies; of ties, see `chunked_quantiles`.

    Further arguments:
        ratios: R shares from 0 to 1.
        num_keys: only weights on so many leading keys (vision) are pooled; None: on all.
        rank_error: how far the share below a threshold may fall short of its ratio (Triton: differ from it, by three
            standard errors); 0: as little as ties allow. None: 1e-4 of the Triton back end, 0 of the chunked one; the
            dense one is exact.

    Returns:
        (B, h, R). With a rank error of 0 each is one of the back end's own weights (Triton: between two of them).
    """
    x = checked(q, k, lengths=lengths, num_keys=num_keys, chunk=chunk, ratios=ratios, rank_error=rank_error)
    return choose_backend(backend, q, k).pooled_quantiles(x, ratios, rank_error)


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
    """Like `pooled_quantiles`, for each query's row apart: at most a share `ratio` of the row lies below.

    Returns:
        (B, h, N, R), each one of the row's weights (Triton: 2^-17 of itself below it); 0 at padded queries.
    """
    x = checked(q, k, lengths=lengths, num_keys=num_keys, chunk=chunk, ratios=ratios)
    return choose_backend(backend, q, k).row_quantiles(x, ratios)


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
    """`row_statistics`, `key_statistics` and `pooled_quantiles` of one layer, as a rule in two passes over its weights.

    Arguments are those of the three functions; `num_keys` restricts the thresholds only.
    """
    x = checked(q, k, lengths=lengths, num_keys=num_keys, chunk=chunk, eps=eps, ratios=ratios, rank_error=rank_error)
    return choose_backend(backend, q, k).layer_statistics(x, eps, ratios, rank_error)


@torch.no_grad()
def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    num_keys: int | None = None,
    lengths: Lengths | None = None,
    renormalise: bool = True,
    tail: Tail = "zero",
    backend: str | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention without the weights strictly below their threshold; every row keeps its largest.

    Further arguments:
        v: (B, h, M, any width) values; the Triton back end needs width d.
        thresholds: (B, h) from `pooled_quantiles`, or (B, h, N) from `row_quantiles`; 0 or -inf removes nothing, inf
            all but the row maxima.
        num_keys: weights on keys from there on (text) are never removed; None: any may be.
        renormalise: rows sum to one again, as if the logits had been -inf (what a sparse kernel computes); False
            leaves zeros where weights were. A row that lost nothing is left as it was.
        tail: `mean` puts the mean of a row's removed weights in the place of each, so that rows sum to one by
            themselves.

    Returns:
        Output (B, h, N, width) in v's dtype, 0 at padded queries; realised ratio (B, h), the removed share of all
        weights that may be removed (N M of them, with `num_keys` N num_keys); dropped mass (B, h), the mean over rows
        of the removed weight, before renormalising.
    """
    x = checked(q, k, v=v, lengths=lengths, num_keys=num_keys, chunk=chunk, thresholds=thresholds)
    if tail not in get_args(Tail):
        raise ValueError(f"got tail {tail!r}, expected one of {', '.join(get_args(Tail))}.")
    return choose_backend(backend, q, k, v).masked_attention(x, v, thresholds, renormalise, tail)


def uniform_attention(v: Tensor) -> Tensor:
    """Every query attends to every key alike: the mean of v (B, h, M, d) over its keys, broadcast to every row."""
    return v.float().mean(dim=-2, keepdim=True).to(v.dtype).expand_as(v)


@torch.no_grad()
def log_histogram(
    q: Tensor,
    k: Tensor,
    *,
    bins: int = 64,
    lowest: float = 1e-12,
    lengths: Lengths | None = None,
    backend: str | None = None,
    chunk: int | None = None,
) -> Tensor:
    """How many weights of each head lie in each of `bins` equal parts of log10 A, from log10 `lowest` to 0.

    Further arguments:
        bins: how many.
        lowest: lower edge of the first bin, which also counts all that is smaller, underflow to 0 included.

    Returns:
        (B, h, bins) int64, which sum to a head's number of weights. Weights within rounding of an edge may count on
        either side; NaN counts in the first bin.
    """
    if bins < 1 or not 0.0 < lowest < 1.0:
        raise ValueError(f"got {bins} bins from {lowest}, expected at least one, from a weight between 0 and 1.")
    x = checked(q, k, lengths=lengths, chunk=chunk)
    return choose_backend(backend, q, k).log_histogram(x, bins, lowest)


@torch.no_grad()
def pooled_map(q: Tensor, k: Tensor, size: int = 512, *, chunk: int | None = None) -> Tensor:
    """The attention map of each head, averaged over `size` x `size` equal cells; chunked on every device.

    Both token axes are cut into `size` equal parts. Where tokens do not divide evenly, one that lies across a cut
    counts in both parts by its overlap, so the map's mean is the mean weight 1 / M at any size.

    Further arguments:
        size: S; above the number of tokens, cells repeat.

    Returns:
        (B, h, S, S), queries first.
    """
    if size < 1:
        raise ValueError(f"got size {size}, expected at least one cell.")
    return maps.pooled_map(checked(q, k, chunk=chunk), size)


@torch.no_grad()
def frame_offset_mass(
    q: Tensor,
    k: Tensor,
    frames: int,
    tokens_per_frame: int,
    *,
    lengths: Lengths | None = None,
    chunk: int | None = None,
) -> Tensor:
    """How much attention goes how many latent frames ahead or back, mean over vision queries; chunked on every device.

    Further arguments:
        frames: F; vision tokens lie frame by frame, and all of them are valid.
        tokens_per_frame: vision tokens of one frame.

    Returns:
        (B, h, 2 F - 1): index F - 1 + o holds the mass on keys that lie o frames after the query. With the mass on text
        keys they sum to 1.
    """
    x = checked(q, k, lengths=lengths, chunk=chunk)
    tokens = min(q.shape[2], k.shape[2]) if x.lengths is None else int(x.lengths.min())
    if min(frames, tokens_per_frame) < 1 or frames * tokens_per_frame > tokens:
        raise ValueError(
            f"got {frames} frames of {tokens_per_frame} tokens for {q.shape[2]} queries and {k.shape[2]} keys"
            f"{'' if x.lengths is None else f', of which {x.lengths.tolist()} are valid'}, "
            "expected at least one of each and no more than there are tokens, vision tokens first."
        )
    return maps.frame_offset_mass(x, frames, tokens_per_frame)
