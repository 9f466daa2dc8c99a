"""Measurement of and intervention in attention: pure functions, tensors in, tensors out, no architecture.

Legend: B batch, N tokens (queries and keys, vision first), h heads, d head width, D width, R ratios, E eps values.
"""

from trainer.attention.api import (
    frame_offset_mass,
    key_statistics,
    layer_statistics,
    log_histogram,
    masked_attention,
    pooled_map,
    pooled_quantiles,
    row_quantiles,
    row_statistics,
    sink_statistics,
    uniform_attention,
)
from trainer.attention.backend import LayerStatistics, RowStatistics
from trainer.attention.sinks import EPS, SinkStatistics, sink_verdict, through_projection

__all__ = [
    "EPS",
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
