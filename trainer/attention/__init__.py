"""Measurement of and intervention in attention: pure functions, tensors in, tensors out, no architecture.

Legend: B batch, N tokens (queries and keys, vision first), h heads, d head width, D width, R ratios, E eps values.
"""

from trainer.attention.masking import masked_attention, uniform_attention
from trainer.attention.quantile import pooled_quantiles
from trainer.attention.statistics import SinkStatistics, sink_statistics, sink_verdict, through_projection

__all__ = [
    "SinkStatistics",
    "masked_attention",
    "pooled_quantiles",
    "sink_statistics",
    "sink_verdict",
    "through_projection",
    "uniform_attention",
]
