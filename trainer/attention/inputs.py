"""What the functions of the engine take, checked once: `checked` raises ValueError or gives `Inputs`.

Legend: B batch, N queries, M keys, h heads, d head width, E eps values, R ratios.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

#: Valid tokens per sample, (B,): tokens from there on are padding, neither queries nor keys.
Lengths = Tensor | Sequence[int]


@dataclass(frozen=True)
class Inputs:
    """Queries and keys of one layer, and which of them count. Made by `checked`.

    Args:
        q: (B, h, N, d) queries as the softmax sees them (after norm and rotary embedding), any floating dtype.
        k: (B, h, M, d) keys.
        lengths: (B,) int64 on q's device, valid tokens per sample; None: all are valid.
        num_keys: how many leading keys are pooled for thresholds, and may be masked; M for all.
        chunk: query rows at a time of the chunked back end; None chooses by memory.
    """

    q: Tensor
    k: Tensor
    lengths: Tensor | None
    num_keys: int
    chunk: int | None

    def padding(self) -> Tensor | None:
        """(B, N) bool, true from each sample's length on; None if all tokens are valid."""
        if self.lengths is None:
            return None
        return torch.arange(self.q.shape[2], device=self.q.device) >= self.lengths[:, None]

    def pool_sizes(self) -> list[int]:
        """Per sample, how many weights of a head have a valid query and a valid key among the first `num_keys`."""
        if self.lengths is None:
            return [self.q.shape[2] * self.num_keys] * self.q.shape[0]
        return [length * min(length, self.num_keys) for length in self.lengths.tolist()]


def checked(
    q: Tensor,
    k: Tensor,
    *,
    v: Tensor | None = None,
    lengths: Lengths | None = None,
    num_keys: int | None = None,
    chunk: int | None = None,
    eps: Sequence[float] = (),
    ratios: Sequence[float] = (),
    rank_error: float | None = None,
    lse: Tensor | None = None,
    thresholds: Tensor | None = None,
    num_vision: int | None = None,
) -> Inputs:
    """The inputs of one layer. Functions give the arguments that they have; None and () are not checked.

    Args:
        q: (B, h, N, d).
        k: (B, h, M, d).
        v: (B, h, M, any width).
        lengths: (B,) integers from 1 to N; needs N = M.
        num_keys: from 1 to M; None: M.
        chunk: at least 1.
        eps: E numbers of at least 0.
        ratios: R shares from 0 to 1.
        rank_error: from 0 to 1.
        lse: (B, h, N).
        thresholds: (B, h) or (B, h, N).
        num_vision: from 1 to the length of the shortest sample.

    Raises:
        ValueError: if one of these does not hold.
    """
    _check_heads(q, k, v)
    valid, keys = _checked_lengths(lengths, q, k), k.shape[2]
    if num_keys is not None and not 1 <= num_keys <= keys:
        raise ValueError(f"got num_keys {num_keys} for {keys} keys, expected 1 .. {keys}, the counted keys first.")
    if chunk is not None and chunk < 1:
        raise ValueError(f"got chunk {chunk}, expected at least one query row, or None to have it chosen.")
    if not all(e >= 0.0 for e in eps):
        raise ValueError(f"got eps {tuple(eps)}, expected weights, each at least 0.")
    if rank_error is not None and not 0.0 <= rank_error <= 1.0:
        raise ValueError(f"got rank_error {rank_error}, expected a share of the weights, e.g. 1e-4.")
    if not all(0.0 <= r <= 1.0 for r in ratios):
        raise ValueError(f"got ratios {tuple(ratios)}, expected shares of the weights, each from 0 to 1.")
    if lse is not None and lse.shape != q.shape[:3]:
        raise ValueError(f"got lse of shape {tuple(lse.shape)}, expected one per query, {tuple(q.shape[:3])}.")
    if thresholds is not None and thresholds.shape not in (q.shape[:2], q.shape[:3]):
        raise ValueError(
            f"got thresholds of shape {tuple(thresholds.shape)} for q of shape {tuple(q.shape)}, expected one per "
            "sample and head, (B, h), or per row, (B, h, N): select one ratio of pooled_quantiles first."
        )
    if num_vision is not None and not 1 <= num_vision <= (keys if valid is None else int(valid.min())):
        of = f"{keys} keys" if valid is None else f"samples of {valid.tolist()} tokens"
        raise ValueError(f"got num_vision {num_vision} for {of}, expected 1 or more in each, vision tokens first.")
    return Inputs(q, k, valid, keys if num_keys is None else num_keys, chunk)


def _check_heads(q: Tensor, k: Tensor, v: Tensor | None) -> None:
    fit = q.ndim == k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fit or 0 in (q.shape[2], k.shape[2]):
        raise ValueError(
            f"got q of shape {tuple(q.shape)} and k of shape {tuple(k.shape)}, expected (B, h, tokens, d) with equal "
            "B, h, d and at least one token each. Move the head axis before the token axis."
        )
    if v is not None and (v.ndim != 4 or v.shape[:3] != k.shape[:3]):
        raise ValueError(
            f"got v of shape {tuple(v.shape)} for k of shape {tuple(k.shape)}, expected one value per key, "
            "(B, h, tokens, width). Move the head axis before the token axis."
        )


def _checked_lengths(lengths: Lengths | None, q: Tensor, k: Tensor) -> Tensor | None:
    """`lengths` as (B,) int64 on q's device."""
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


def threshold_ranks(ratios: Sequence[float], total: int) -> list[int]:
    """Index, ascending from 0, of the threshold at each ratio r among `total` weights: min(floor(r total), total - 1).

    r counts as the decimal that it is written as: .29 of 100 are 29, although the float64 product is below.
    """
    return [min(math.floor(Fraction(str(float(r))) * total), total - 1) for r in ratios]
