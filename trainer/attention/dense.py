"""The dense back end, in float64: the reference that the others are tested against. It stores all N M weights: small N.

The functions are written from the definitions, without the helpers of the other back ends. `lengths` (B,) are valid
tokens per sample: tokens from there on are padding, neither queries nor keys, and their weights are 0.

Legend: B batch, N queries, M keys, h heads, d head width, R ratios, E eps values, F frames, S side of a pooled map.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from trainer.attention.backend import LayerStatistics, RowStatistics, Tail
from trainer.attention.inputs import Inputs, Lengths


def _valid_queries(weights_or_q: Tensor, lengths: Lengths | None) -> list[int]:
    """Valid queries of each sample, from weights (B, h, N, M) or q (B, h, N, d)."""
    batch, _, tokens, _ = weights_or_q.shape
    return [tokens] * batch if lengths is None else [int(length) for length in lengths]


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T / sqrt(d), (B, h, N, M) float64."""
    return q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])


def attention_weights(q: Tensor, k: Tensor, lengths: Lengths | None = None) -> Tensor:
    """A = softmax(Q K^T / sqrt(d)), (B, h, N, M) float64."""
    scores = logits(q, k)
    if lengths is None:
        return torch.softmax(scores, dim=-1)
    weights = torch.zeros_like(scores)
    for sample, length in enumerate(_valid_queries(q, lengths)):
        weights[sample, :, :length, :length] = torch.softmax(scores[sample, :, :length, :length], dim=-1)
    return weights


def row_statistics(q: Tensor, k: Tensor, lengths: Lengths | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp of the logits, largest weight and entropy in nats of every row, each (B, h, N) float64."""
    scores = logits(q, k)
    found = [torch.zeros(q.shape[:3], dtype=torch.float64, device=q.device) for _ in range(3)]
    for sample, length in enumerate(_valid_queries(q, lengths)):
        own = scores[sample, :, :length] if lengths is None else scores[sample, :, :length, :length]
        weights = torch.softmax(own, dim=-1)
        found[0][sample, :, :length] = torch.logsumexp(own, dim=-1)
        found[1][sample, :, :length] = weights.amax(dim=-1)
        found[2][sample, :, :length] = -torch.xlogy(weights, weights).sum(dim=-1)
    return found[0], found[1], found[2]


def key_statistics(weights: Tensor, eps: Sequence[float]) -> tuple[Tensor, Tensor]:
    """sum_i A_ik, (B, h, M) float64, and #{i: A_ik > eps}, (B, h, E, M) int32."""
    counts = [(weights > e).sum(dim=-2, dtype=torch.int32) for e in eps]
    empty = torch.zeros(*weights.shape[:2], 0, weights.shape[-1], dtype=torch.int32, device=weights.device)
    return weights.sum(dim=-2), torch.stack(counts, dim=2) if counts else empty


def heavy_fractions(weights: Tensor, eps: Sequence[float]) -> Tensor:
    """mean_i 1[A_ik > eps] for every key k, (B, h, N, E) float64."""
    return torch.stack([(weights > e).double().mean(dim=-2) for e in eps], dim=-1)


def alpha(weights: Tensor) -> Tensor:
    """alpha_k = mean_i A_ik, (B, h, N) float64."""
    return weights.mean(dim=-2)


def rank(ratio: float, total: int) -> int:
    """Index, ascending from 0, of the threshold at `ratio` among `total` weights."""
    return min(math.floor(Fraction(str(ratio)) * total), total - 1)


def _pools(weights: Tensor, num_keys: int | None, lengths: Lengths | None) -> Iterator[Tensor]:
    """Yields each sample's weights (h, valid queries, valid keys among the first `num_keys`)."""
    for own, length in zip(weights, _valid_queries(weights, lengths), strict=True):
        last = own.shape[-1] if lengths is None else length
        yield own[:, :length, : last if num_keys is None else min(last, num_keys)]


def pooled_quantiles(
    weights: Tensor, ratios: Sequence[float], *, num_keys: int | None = None, lengths: Lengths | None = None
) -> Tensor:
    """The order statistic of all weights of a head at each ratio, (B, h, R) float64."""
    if not ratios:
        return weights.new_zeros(*weights.shape[:2], 0)
    found = []
    for pool in _pools(weights, num_keys, lengths):
        ordered = pool.flatten(1).sort(dim=-1).values
        found.append(ordered[:, [rank(r, ordered.shape[-1]) for r in ratios]])
    return torch.stack(found)


def row_quantiles(
    weights: Tensor, ratios: Sequence[float], *, num_keys: int | None = None, lengths: Lengths | None = None
) -> Tensor:
    """The order statistic of every row at each ratio, (B, h, N, R) float64; 0 at padded queries."""
    found = weights.new_zeros(*weights.shape[:3], len(ratios))
    for sample, pool in zip(found, _pools(weights, num_keys, lengths), strict=True):
        ordered = pool.sort(dim=-1).values
        sample[:, : pool.shape[1]] = ordered[..., [rank(r, ordered.shape[-1]) for r in ratios]]
    return found


def masked_attention(
    weights: Tensor,
    v: Tensor,
    thresholds: Tensor,
    *,
    num_keys: int | None = None,
    lengths: Lengths | None = None,
    renormalise: bool = True,
    tail: Tail = "zero",
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, h, N, d), removed share (B, h) and dropped mass (B, h), all float64.

    Weights strictly below their threshold, (B, h) or (B, h, N), are removed, except each row's largest and all keys
    from `num_keys` on. The share is of the weights that could have been removed.
    """
    limit = thresholds.double()[..., None] if thresholds.ndim == 3 else thresholds.double()[..., None, None]
    counted = torch.zeros_like(weights, dtype=torch.bool)
    for sample, pool in zip(counted, _pools(weights, num_keys, lengths), strict=True):
        sample[:, : pool.shape[1], : pool.shape[2]] = True
    removed = counted & (weights < limit) & (weights < weights.amax(dim=-1, keepdim=True))
    kept = weights.masked_fill(removed, 0.0)
    mass, number = (weights - kept).sum(dim=-1, keepdim=True), removed.sum(dim=-1, keepdim=True)
    if tail == "mean":
        kept = torch.where(removed, mass / number.clamp(min=1), kept)
    elif renormalise:
        kept = torch.where(number > 0, kept / kept.sum(dim=-1, keepdim=True), kept)
    queries = torch.tensor(_valid_queries(weights, lengths), dtype=torch.float64, device=weights.device)[:, None]
    share = removed.sum(dim=(-1, -2)).double() / counted.sum(dim=(-1, -2))
    return kept @ v.double(), share, mass[..., 0].sum(dim=-1) / queries


def log_histogram(weights: Tensor, *, bins: int, lowest: float, lengths: Lengths | None = None) -> Tensor:
    """Counts (B, h, bins) int64 in equal bins of log10 A from log10 lowest to 0; smaller ones and NaN in the first."""
    low = math.log10(lowest)
    found = []
    for pool in _pools(weights, None, lengths):
        index = ((pool.flatten(1).log10() - low) / -low * bins).floor().clamp(0, bins - 1).nan_to_num(0.0).long()
        found.append(torch.stack([torch.bincount(head, minlength=bins) for head in index]))
    return torch.stack(found)


def pooled_map(weights: Tensor, size: int) -> Tensor:
    """Mean of A, taken as a step function on the unit square, over size x size equal cells; (B, h, S, S) float64."""

    def cells(tokens: int) -> Tensor:
        edges = torch.arange(size + 1, dtype=torch.float64, device=weights.device) * tokens / size
        token = torch.arange(tokens, dtype=torch.float64, device=weights.device)
        overlap = torch.minimum(edges[1:, None], token + 1) - torch.maximum(edges[:-1, None], token)
        return overlap.clamp(min=0) * size / tokens  # (S, tokens), rows sum to 1

    return cells(weights.shape[-2]) @ weights @ cells(weights.shape[-1]).T


def frame_offset_mass(weights: Tensor, frames: int, tokens_per_frame: int) -> Tensor:
    """Mean over vision queries of the mass at each frame offset, key's minus query's, (B, h, 2 F - 1) float64."""
    vision = frames * tokens_per_frame
    found = torch.zeros(*weights.shape[:2], 2 * frames - 1, dtype=torch.float64, device=weights.device)
    for query in range(vision):
        for key in range(vision):
            offset = key // tokens_per_frame - query // tokens_per_frame
            found[..., offset + frames - 1] += weights[..., query, key]
    return found / vision


def value_norm_ratio(norms: Tensor, key: Tensor) -> Tensor:
    """|v_key| / mean of the other norms; norms (B, h, N), key (B, h)."""
    at_key = norms.gather(-1, key[..., None])[..., 0]
    return at_key / ((norms.sum(dim=-1) - at_key) / (norms.shape[-1] - 1))


class Dense64:
    """`Backend` in float64 that stores all weights; outputs of `masked_attention` are in v's dtype."""

    def row_statistics(self, x: Inputs) -> RowStatistics:
        return RowStatistics(*row_statistics(x.q, x.k, x.lengths))

    def key_statistics(self, x: Inputs, eps: Sequence[float], lse: Tensor | None) -> tuple[Tensor, Tensor]:
        return key_statistics(_weights(x), eps)

    def pooled_quantiles(self, x: Inputs, ratios: Sequence[float], rank_error: float | None) -> Tensor:
        return pooled_quantiles(_weights(x), ratios, num_keys=x.num_keys, lengths=x.lengths)

    def row_quantiles(self, x: Inputs, ratios: Sequence[float]) -> Tensor:
        return row_quantiles(_weights(x), ratios, num_keys=x.num_keys, lengths=x.lengths)

    def layer_statistics(
        self, x: Inputs, eps: Sequence[float], ratios: Sequence[float], rank_error: float | None
    ) -> LayerStatistics:
        mass, counts = self.key_statistics(x, eps, None)
        thresholds = self.pooled_quantiles(x, ratios, rank_error)
        return LayerStatistics(self.row_statistics(x), mass, counts, thresholds)

    def masked_attention(
        self, x: Inputs, v: Tensor, thresholds: Tensor, renormalise: bool, tail: Tail
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, realised, dropped = masked_attention(
            _weights(x), v, thresholds, num_keys=x.num_keys, lengths=x.lengths, renormalise=renormalise, tail=tail
        )
        return out.to(v.dtype), realised, dropped

    def log_histogram(self, x: Inputs, bins: int, lowest: float) -> Tensor:
        return log_histogram(_weights(x), bins=bins, lowest=lowest, lengths=x.lengths)


def _weights(x: Inputs) -> Tensor:
    return attention_weights(x.q, x.k, x.lengths)
