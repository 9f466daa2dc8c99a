"""The chunked back end: float32 weights a chunk of query rows at a time, on any device.

Legend: B batch, N queries, M keys, h heads, d head width, E eps values, R ratios.
"""

from collections.abc import Sequence

from torch import Tensor

from trainer.attention import chunked_masking, chunked_quantiles, chunked_statistics
from trainer.attention.backend import LayerStatistics, RowStatistics
from trainer.attention.chunked_weights import logit_and_weight_chunks, weight_chunks
from trainer.attention.inputs import Inputs


class Chunked:
    """`Backend` that holds one chunk of weights, and a few times its memory, at a time."""

    row_quantiles = staticmethod(chunked_quantiles.row_quantiles)
    masked_attention = staticmethod(chunked_masking.masked_attention)
    log_histogram = staticmethod(chunked_statistics.log_histogram)

    def row_statistics(self, x: Inputs) -> RowStatistics:
        rows = chunked_statistics.RowCollector(x)
        for start, logits, weights in logit_and_weight_chunks(x):
            rows.add(start, logits, weights)
        return rows.result()

    def key_statistics(self, x: Inputs, eps: Sequence[float], lse: Tensor | None) -> tuple[Tensor, Tensor]:
        keys = chunked_statistics.KeyCollector(x, eps)
        for _, weights in weight_chunks(x):
            keys.add(weights)
        return keys.mass, keys.counts

    def pooled_quantiles(self, x: Inputs, ratios: Sequence[float], rank_error: float | None) -> Tensor:
        return chunked_quantiles.pooled_quantiles(x, ratios, rank_error or 0.0)

    def layer_statistics(
        self, x: Inputs, eps: Sequence[float], ratios: Sequence[float], rank_error: float | None
    ) -> LayerStatistics:
        """Reads rows and keys in the first pass of the thresholds."""
        rows, keys = chunked_statistics.RowCollector(x), chunked_statistics.KeyCollector(x, eps)

        def observer(start: int, logits: Tensor, weights: Tensor) -> None:
            rows.add(start, logits, weights)
            keys.add(weights)

        thresholds = chunked_quantiles.pooled_quantiles(x, ratios, rank_error or 0.0, observer)
        return LayerStatistics(rows.result(), keys.mass, keys.counts, thresholds)
