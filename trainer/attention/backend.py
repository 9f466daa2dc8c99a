"""What a back end of the engine computes. `api` checks what comes in and calls one of them.

Legend: B batch, N queries, M keys, h heads, d head width, E eps values, R ratios.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from trainer.attention.inputs import Inputs

#: What takes the place of removed weights: nothing, or in each row their mean.
Tail = Literal["zero", "mean"]


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of every row of A; 0 at padded queries.

    Args:
        lse: (B, h, N) log-sum-exp of the row's logits, natural logarithm.
        maximum: (B, h, N) the row's largest weight.
        entropy: (B, h, N) in nats.
    """

    lse: Tensor
    maximum: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """Results of `row_statistics`, `key_statistics` and `pooled_quantiles` for one layer.

    Args:
        rows: of `row_statistics`.
        mass: (B, h, M) column sums, of `key_statistics`.
        counts: (B, h, E, M) queries with A > eps, of `key_statistics`.
        thresholds: (B, h, R), of `pooled_quantiles`.
    """

    rows: RowStatistics
    mass: Tensor
    counts: Tensor
    thresholds: Tensor


class Backend(Protocol):
    """One way to compute statistics of A. Each method gives what the function of the same name in `api` gives."""

    def row_statistics(self, x: Inputs) -> RowStatistics: ...

    def key_statistics(self, x: Inputs, eps: Sequence[float], lse: Tensor | None) -> tuple[Tensor, Tensor]: ...

    def pooled_quantiles(self, x: Inputs, ratios: Sequence[float], rank_error: float | None) -> Tensor: ...

    def row_quantiles(self, x: Inputs, ratios: Sequence[float]) -> Tensor: ...

    def layer_statistics(
        self, x: Inputs, eps: Sequence[float], ratios: Sequence[float], rank_error: float | None
    ) -> LayerStatistics: ...

    def masked_attention(
        self, x: Inputs, v: Tensor, thresholds: Tensor, renormalise: bool, tail: Tail
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def log_histogram(self, x: Inputs, bins: int, lowest: float) -> Tensor: ...
