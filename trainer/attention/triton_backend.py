"""The Triton back end: tiles of weights that each pass computes again, on CUDA.

Legend: B batch, N tokens (queries and keys), h heads, d head width, E eps values, R ratios.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainer.attention import chunked_quantiles, triton_quantiles
from trainer.attention.backend import LayerStatistics, RowStatistics, Tail
from trainer.attention.inputs import Inputs
from trainer.attention.triton_launch import key_pass, masked_pass, row_pass, valid_tokens

#: Rank error of `pooled_quantiles` if nothing else is asked for.
_RANK_ERROR = 1e-4
#: By which a weight may differ between this and the chunked back end, as a share of itself.
_ROUNDING = 2.0**-17
#: In t: weights so close to their row's largest count as it.
_SLACK = 2.0**-16
#: Edges of a histogram that one pass counts: each holds registers.
_EDGES_PER_PASS = 9


class Triton:
    """`Backend` by Triton kernels; needs N = M, and values as wide as q and k."""

    def row_statistics(self, x: Inputs) -> RowStatistics:
        return _row_statistics(x, *row_pass(x))

    def key_statistics(self, x: Inputs, eps: Sequence[float], lse: Tensor | None) -> tuple[Tensor, Tensor]:
        base2 = row_pass(x, entropy=False)[0] if lse is None else (lse.float() / math.log(2)).contiguous()
        return key_pass(x, base2, eps=eps)[:2]

    def pooled_quantiles(self, x: Inputs, ratios: Sequence[float], rank_error: float | None) -> Tensor:
        lse, top, _ = row_pass(x, entropy=False)
        return triton_quantiles.pooled_quantiles(x, ratios, _error(rank_error), lse=lse, top=top)[0]

    def row_quantiles(self, x: Inputs, ratios: Sequence[float]) -> Tensor:
        """Sorts whole rows of chunked weights, and lowers the thresholds by 2^-17 of themselves.

        The mask multiplies in tiles, where a weight may have another last bit: so the threshold's own weight and what
        ties with it stay.
        """
        return chunked_quantiles.row_quantiles(x, ratios).mul_(1 - _ROUNDING)

    def layer_statistics(
        self, x: Inputs, eps: Sequence[float], ratios: Sequence[float], rank_error: float | None
    ) -> LayerStatistics:
        lse, top, entropy = row_pass(x)
        thresholds, mass, counts = triton_quantiles.pooled_quantiles(
            x, ratios, _error(rank_error), lse=lse, top=top, eps=eps
        )
        return LayerStatistics(_row_statistics(x, lse, top, entropy), mass, counts, thresholds)

    def masked_attention(
        self, x: Inputs, v: Tensor, thresholds: Tensor, renormalise: bool, tail: Tail
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse, top, _ = row_pass(x, entropy=False)
        limits = thresholds.float().clamp(min=0).log2()
        # A row's largest weight stays; another tile size may round its product otherwise, hence the slack.
        limits = torch.minimum(limits if limits.ndim == 3 else limits[..., None], top - _SLACK).contiguous()
        out, removed, dropped = masked_pass(x, v, lse, limits, renormalise=renormalise, mean_tail=tail == "mean")
        removable = torch.tensor(x.pool_sizes(), dtype=torch.float32, device=x.q.device)
        return out, removed.float() / removable[:, None], dropped / valid_tokens(x)[:, None]

    def log_histogram(self, x: Inputs, bins: int, lowest: float) -> Tensor:
        lse = row_pass(x, entropy=False)[0]
        edges = torch.linspace(math.log2(lowest), 0.0, bins + 1, dtype=torch.float64)[1:-1]
        edges = edges.float().to(x.q.device).expand(*x.q.shape[:2], -1)
        total = torch.tensor(x.pool_sizes(), device=x.q.device)[:, None, None]
        above = [total.expand(*x.q.shape[:2], 1)]  # weights above each bin's lower edge; of the first, all
        above += [key_pass(x, lse, edges=part)[2] for part in edges.split(_EDGES_PER_PASS, dim=-1)]
        counts = torch.cat(above, dim=-1)
        return counts - pad(counts[..., 1:], (0, 1))


def _error(rank_error: float | None) -> float:
    return _RANK_ERROR if rank_error is None else rank_error


def _row_statistics(x: Inputs, lse: Tensor, top: Tensor, entropy: Tensor) -> RowStatistics:
    """From the results of `row_pass`."""
    maximum, padding = top.exp2(), x.padding()
    if padding is not None:
        maximum.masked_fill_(padding[:, None], 0.0)
    return RowStatistics(lse * math.log(2), maximum, entropy)
