"""Measurements without figures: they measure, write and log what the product's do.

A figure costs half a second of a core, more than the eight steps before it. `test_probe_callback.py` looks at the
figures of a fit, `test_kill_ranks.py` and `test_kill_random.py` at those of commands.
"""

from trainer.callbacks import masking, sinks


class SinkFrequency(sinks.SinkFrequency):
    """Attention sinks of a fit whose figures nobody looks at."""

    def figures(self, module, arrays, stage):
        return {}


class MaskingRobustness(masking.MaskingRobustness):
    """Masking of a fit whose figures nobody looks at."""

    def figures(self, module, arrays, stage):
        return {}
