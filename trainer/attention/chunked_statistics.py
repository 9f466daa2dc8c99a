"""Row and key statistics and histograms, collected from chunks of weights.

Legend: B batch, N queries, M keys, h heads, c query rows of a chunk, E eps values.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.attention.backend import RowStatistics
from trainer.attention.chunked_weights import weight_chunks
from trainer.attention.inputs import Inputs

#: From this eps on, weights above eps are rare, and are counted one by one instead of by column.
_RARE_EPS = 0.004


class RowCollector:
    """Row statistics, filled in chunk by chunk."""

    def __init__(self, x: Inputs) -> None:
        self._x = x
        self._rows = RowStatistics(*(torch.zeros(x.q.shape[:3], device=x.q.device) for _ in range(3)))

    def add(self, start: int, logits: Tensor, weights: Tensor) -> None:
        """Takes in a chunk's first row, logits and weights, both (B, h, c, M); overwrites the logits."""
        rows = slice(start, start + logits.shape[2])
        top, largest = logits.amax(dim=-1, keepdim=True), weights.amax(dim=-1)
        gap = logits.sub_(top).clamp_(min=-1e9)  # finite, so that a weight of 0 times its gap is 0
        self._rows.lse[:, :, rows] = top[..., 0] - largest.log()  # the largest weight is one over the sum of exp(gap)
        self._rows.maximum[:, :, rows] = largest
        # From gaps to the row's maximum, so that nothing large cancels.
        self._rows.entropy[:, :, rows] = -largest.log() - torch.linalg.vecdot(weights, gap)

    def result(self) -> RowStatistics:
        """The statistics of all rows; to be called once."""
        padding = self._x.padding()
        if padding is not None:
            for part in (self._rows.lse, self._rows.maximum, self._rows.entropy):
                part.masked_fill_(padding[:, None], 0.0)
        return self._rows


class KeyCollector:
    """Column sums (B, h, M) float32 and counts of A > eps (B, h, E, M) int32, summed up chunk by chunk."""

    def __init__(self, x: Inputs, eps: Sequence[float]) -> None:
        batch, heads, keys = x.k.shape[:3]
        self._eps = eps
        self.mass = torch.zeros(batch, heads, keys, device=x.k.device)
        self.counts = torch.zeros(batch, heads, len(eps), keys, dtype=torch.int32, device=x.k.device)

    def add(self, weights: Tensor) -> None:
        """Takes in a chunk's weights (B, h, c, M)."""
        self.mass += weights.sum(dim=-2)
        if self._eps and min(self._eps) >= _RARE_EPS and weights.device.type == "cpu":
            self._count_rare(weights)
        else:
            for index, value in enumerate(self._eps):
                self.counts[:, :, index] += (weights > value).sum(dim=-2, dtype=torch.int32)

    def _count_rare(self, weights: Tensor) -> None:
        """Counts only the few weights above the least eps: at most 1 / eps in a row."""
        batch, heads, _, keys = self.counts.shape
        heavy = (weights > min(self._eps)).view(batch * heads, -1, keys)
        head, row, key = heavy.nonzero(as_tuple=True)
        values, column = weights.view(batch * heads, -1, keys)[head, row, key], head * keys + key
        for index, value in enumerate(self._eps):
            number = torch.bincount(column[values > value], minlength=batch * heads * keys)
            self.counts[:, :, index] += number.view(batch, heads, keys).to(torch.int32)


def log_histogram(x: Inputs, bins: int, lowest: float) -> Tensor:
    """As `api.log_histogram`, (B, h, bins) int64."""
    low = math.log10(lowest)
    counts = torch.zeros(x.q.shape[0] * x.q.shape[1], bins, dtype=torch.int64, device=x.q.device)
    for _, weights in weight_chunks(x):
        index = weights.log10_().sub_(low).mul_(bins / -low).clamp_(0, bins - 1).nan_to_num_(0.0).to(torch.int32)
        for head, own in enumerate(index.flatten(0, 1)):
            counts[head] += torch.bincount(own.flatten(), minlength=bins)
    counts = counts.view(*x.q.shape[:2], bins)
    # Weights of padded queries and keys are 0 and were counted in the first bin.
    total = torch.tensor(x.pool_sizes(), device=x.q.device)
    counts[..., 0] -= x.q.shape[2] * x.k.shape[2] - total[:, None]
    return counts
