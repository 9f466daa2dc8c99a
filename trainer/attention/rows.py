"""The one place where attention weights are computed: row chunks of A = softmax(Q K^T / sqrt(d)) in float32.

The quantile pass and the masking pass both read their weights from here, with the same chunks, so that a weight
compares with a threshold taken from it as equal, bit for bit.

Legend: B batch, N queries, M keys, h heads, d head width, c rows of a chunk.
"""

import importlib.util
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

#: Default size of one chunk, in weights: 128 MiB of float32.
CHUNK_WEIGHTS = 2**25
#: The same on a CPU: 16 MiB, which its caches hold between the steps of a pass; half the time of 128 MiB.
CPU_CHUNK_WEIGHTS = 2**22

#: Valid tokens per sample, (B,): what lies behind is neither query nor key.
Lengths = Tensor | Sequence[int]


def check_heads(q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless q and k are (B, h, tokens, d) with equal B, h, d and at least one token."""
    same = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not same or 0 in (q.shape[2], k.shape[2]):
        raise ValueError(
            f"got q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)}, expected (B, h, tokens, d) with equal "
            "B, h, d and at least one token each. Move the head axis before the token axis."
        )


def choose_backend(backend: str | None, q: Tensor, k: Tensor) -> str:
    """`backend`, or the one for q and k: `triton` on CUDA where it is installed and N = M, else `chunked`.

    Raises:
        ValueError: if there is no back end of that name, or it cannot work on q's device.
    """
    if backend not in (None, "dense", "chunked", "triton"):
        raise ValueError(f"got backend {backend!r}, expected 'dense', 'chunked', 'triton' or None to have it chosen.")
    installed = importlib.util.find_spec("triton") is not None
    if backend is None:
        return "triton" if q.is_cuda and installed and q.shape[2] == k.shape[2] else "chunked"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if backend == "triton" and not (installed and (q.is_cuda or interpreted)):
        raise ValueError(
            f"got backend 'triton' for tensors on {q.device} ({'' if installed else 'not '}installed); expected CUDA, "
            "or TRITON_INTERPRET=1 in the environment to have its kernels interpreted. Use 'chunked'."
        )
    if backend == "triton" and q.shape[2] != k.shape[2]:
        raise ValueError(f"got {q.shape[2]} queries and {k.shape[2]} keys, expected equally many. Use 'chunked'.")
    return backend


def check_lengths(lengths: Lengths | None, q: Tensor, k: Tensor) -> Tensor | None:
    """`lengths` as (B,) int64 on q's device; None if not given.

    Raises:
        ValueError: if there is not one per sample, each from 1 to N, or if q and k differ in length.
    """
    if lengths is None:
        return None
    found = torch.as_tensor(lengths)
    whole = found.dtype != torch.bool and not found.is_floating_point()
    if q.shape[2] != k.shape[2] or found.shape != q.shape[:1] or not whole:
        raise ValueError(
            f"got lengths of shape {tuple(found.shape)} ({found.dtype}) for {q.shape[0]} samples of {q.shape[2]} "
            f"queries and {k.shape[2]} keys, expected one integer per sample and as many queries as keys."
        )
    if found.min() < 1 or found.max() > q.shape[2]:
        raise ValueError(f"got lengths {found.tolist()}, expected from 1 to {q.shape[2]} tokens, padding included.")
    return found.to(q.device, torch.int64)


def check_num_keys(num_keys: int | None, keys: int) -> int:
    """How many leading keys count: `num_keys`, or all.

    Raises:
        ValueError: if it is outside 1 .. M.
    """
    if num_keys is None:
        return keys
    if not 1 <= num_keys <= keys:
        raise ValueError(f"got num_keys {num_keys} for {keys} keys, expected 1 .. {keys}, the counted keys first.")
    return num_keys


def counted_weights(q: Tensor, k: Tensor, num_keys: int, lengths: Tensor | None) -> list[int]:
    """Per sample: how many of its weights have a valid query and a valid key among the first `num_keys`."""
    if lengths is None:
        return [q.shape[2] * num_keys] * q.shape[0]
    return [length * min(length, num_keys) for length in lengths.tolist()]


def shares(ratios: Sequence[float], total: int) -> list[int]:
    """floor(r total) for each ratio, read as the decimal it is written as."""
    return [math.floor(Fraction(str(float(r))) * total) for r in ratios]


def rows_per_chunk(q: Tensor, k: Tensor, chunk: int | None = None) -> int:
    """Query rows c of a chunk: `chunk` if given, else as many as `CHUNK_WEIGHTS` allows; never above N.

    Raises:
        ValueError: if `chunk` is below 1.
    """
    if chunk is None:
        weights = CPU_CHUNK_WEIGHTS if q.device.type == "cpu" else CHUNK_WEIGHTS
        chunk = max(1, weights // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    if chunk < 1:
        raise ValueError(f"got chunk {chunk}, expected at least one query row, or None to have it chosen.")
    return min(chunk, q.shape[2])


def float32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in true float32: neither autocast nor TF32 may round what is being measured."""
    before = torch.get_float32_matmul_precision()
    if before == "highest" and not torch.is_autocast_enabled(a.device.type):
        return a.float() @ b.float()
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(a.device.type, enabled=False):
            return a.float() @ b.float()
    finally:
        torch.set_float32_matmul_precision(before)


def logit_rows(
    q: Tensor, k: Tensor, *, chunk: int | None = None, lengths: Lengths | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Row chunks of Q K^T / sqrt(d): like `weight_rows`, before the softmax.

    Keys behind a sample's length are -inf; queries behind it hold numbers without a meaning.
    """
    check_heads(q, k)
    valid = check_lengths(lengths, q, k)
    rows = rows_per_chunk(q, k, chunk)
    q = q.float() * q.shape[-1] ** -0.5
    k = k.float().transpose(-1, -2)
    behind = None if valid is None else _behind(valid, k.shape[-1])[:, None, None, :]
    for start in range(0, q.shape[2], rows):
        logits = float32_matmul(q[:, :, start : start + rows], k)
        yield start, logits if behind is None else logits.masked_fill_(behind, -torch.inf)
        del logits


def weight_rows(
    q: Tensor, k: Tensor, *, chunk: int | None = None, lengths: Lengths | None = None
) -> Iterator[tuple[int, Tensor]]:
    """Row chunks of the attention weights, in order.

    Args:
        q: (B, h, N, d), any floating dtype.
        k: (B, h, M, d).
        chunk: query rows at a time; None chooses by memory.
        lengths: (B,) valid tokens per sample; needs N = M. None: all.

    Yields:
        First row of the chunk and its weights (B, h, c, M), float32; the caller may write into them. Rows and columns
        behind a sample's length are 0.

    Raises:
        ValueError: if shapes do not agree.
    """
    for start, logits, weights in logit_weight_rows(q, k, chunk=chunk, lengths=lengths):
        del logits
        yield start, weights
        del weights


def logit_weight_rows(
    q: Tensor, k: Tensor, *, chunk: int | None = None, lengths: Lengths | None = None
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """As `weight_rows`, with the logits (B, h, c, M) between, as `logit_rows` yields them."""
    check_heads(q, k)
    valid = check_lengths(lengths, q, k)
    behind = None if valid is None else _behind(valid, q.shape[2])[:, None, :, None]
    for start, logits in logit_rows(q, k, chunk=chunk, lengths=valid):
        weights = torch.softmax(logits, dim=-1)
        if behind is not None:
            weights.masked_fill_(behind[:, :, start : start + weights.shape[2]], 0.0)
        yield start, logits, weights
        del logits, weights  # before the next ones are made: memory that caches still hold is used again


def _behind(lengths: Tensor, tokens: int) -> Tensor:
    """True behind each sample's length, (B, tokens)."""
    return torch.arange(tokens, device=lengths.device) >= lengths[:, None]
