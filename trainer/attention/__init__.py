"""Measurement of and intervention in attention: pure functions, tensors in, tensors out, no architecture.

Legend: B batch, N tokens (queries and keys, vision first), h heads, d head width, D width, R ratios, E eps values.
"""

from trainer.attention.layer import LayerStatistics, layer_statistics
from trainer.attention.maps import frame_offset_mass, log_histogram, pooled_map
from trainer.attention.masking import masked_attention, uniform_attention
from trainer.attention.quantile import pooled_quantiles, row_quantiles
from trainer.attention.statistics import (
    RowStatistics,
    SinkStatistics,
    key_statistics,
    row_statistics,
    sink_statistics,
    sink_verdict,
    through_projection,
)

__all__ = [
    "LayerStatistics",
    "RowStatistics",
    "SinkStatistics",
    "frame_offset_mass",
    "key_statistics",
    "layer_statistics",
    "log_histogram",
    "masked_attention",
    "pooled_map",
    "pooled_quantiles",
    "row_quantiles",
    "row_statistics",
    "sink_statistics",
    "sink_verdict",
    "through_projection",
    "uniform_attention",
]
