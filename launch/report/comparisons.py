"""What has changed between two stages: a difference counts only where its paired interval excludes zero."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from launch.report.charts import number
from launch.report.stages import Arrays, Ends, Head, MaskingStage, SinkStage
from trainer.callbacks.intervals import excludes_zero, few_prompts, paired_bootstrap, share_difference

#: What is said where an interval contains zero, or is missing.
NOISE = "no difference that can be told from noise"

#: Differences up to this share are those of rounding: sums of float32 in another order. They can have one sign in every
#: prompt, so that an interval alone would count them.
ROUNDING = 1e-5

#: Settings that both stages of a comparison must share.
_MASKING_SETTINGS = ("keys", "sigmas", "scopes", "ratios", "masked_keys", "quantile", "removed")
_SINK_SETTINGS = ("keys", "sigmas", "layers")


def ends_text(interval: Ends | None) -> str:
    """An interval as text, in brackets after a space; empty for none."""
    return f" [{number(interval[0])}, {number(interval[1])}]" if interval else ""


@dataclass(frozen=True)
class Change:
    """A figure at two stages.

    Args:
        before: the figure.
        after: the figure.
        interval: of after minus before; None if there is none.
        reason: why `interval` is None.
        scale: what a difference is compared with; the larger of the two figures if None.
    """

    before: float
    after: float
    interval: Ends | None = None
    reason: str = ""
    scale: float | None = None

    @property
    def direction(self) -> int:
        """1 higher, -1 lower, 0 where that cannot be told from noise."""
        if self.interval is None or not excludes_zero(self.interval):
            return 0
        scale = max(abs(self.before), abs(self.after)) if self.scale is None else self.scale
        if abs(self.after - self.before) <= ROUNDING * scale:
            return 0
        return 1 if self.interval[0] > 0 else -1

    def verdict(self, better: int) -> Literal["good", "bad", ""]:
        """Good or bad, where a change in the direction `better` is good; empty without a change."""
        return ("good" if self.direction == better else "bad") if self.direction else ""

    @property
    def words(self) -> str:
        """The change and its interval, or `NOISE`, or why there is nothing to compare."""
        if not math.isfinite(self.after - self.before):
            return f"not compared: {self.reason}"
        if not self.direction:
            return NOISE + (ends_text(self.interval) or f" ({self.reason})")
        by = number(abs(self.after - self.before))
        return f"{'higher' if self.direction > 0 else 'lower'} by {by}{ends_text(self.interval)}"


def _different(before: Arrays, after: Arrays, names: tuple[str, ...]) -> str:
    """Why two stages cannot be paired; empty if they can."""
    differ = [
        name for name in names if name in before and name in after and not np.array_equal(before[name], after[name])
    ]
    return f"the stages differ in {', '.join(differ)}" if differ else ""


@dataclass(frozen=True)
class MaskingComparison:
    """Masking at two stages, on the same probes.

    Args:
        before: stage.
        after: stage.
    """

    before: MaskingStage | None
    after: MaskingStage | None

    @cached_property
    def no_interval(self) -> str:
        """Why differences have no interval; empty if they have one."""
        if self.before is None or self.after is None:
            return "one of the stages was not measured"
        different = _different(self.before.arrays, self.after.arrays, _MASKING_SETTINGS)
        return self.before.no_interval or self.after.no_interval or different

    @cached_property
    def _intervals(self) -> dict[str, tuple]:
        if self.no_interval or self.before is None or self.after is None:
            return {}
        prompts = self.before.arrays["caption_ids"]
        return paired_bootstrap(self.before.statistic, self.before.tables, self.after.tables, prompts) or {}

    def change(self, name: str, scope: str = "retrained") -> Change:
        """A scope's entry in an array (K,) of `MaskingStage.figures`."""
        before, after = (stage.value(name, scope) if stage else math.nan for stage in (self.before, self.after))
        blanks = [stage.blank(name, scope) for stage in (self.before, self.after) if stage]
        blank = next(filter(None, blanks), "")
        if not math.isfinite(after - before) or name not in self._intervals or self.before is None:
            return Change(before, after, None, blank or self.no_interval or "not measured")
        low, high = (float(end[self.before.scopes.index(scope)]) for end in self._intervals[name])
        return Change(before, after, (low, high), scale=1.0)  # of differences of losses, as shares of a loss

    @property
    def relative_loss(self) -> Change:
        """The loss without masking as a share of that before: 0 before, after / before - 1 after."""
        before, after = (stage.dense_loss if stage else math.nan for stage in (self.before, self.after))
        change = after / before - 1
        if self.no_interval or self.before is None or self.after is None or not math.isfinite(change):
            return Change(0.0, change, None, self.no_interval or "not measured")
        old, new = ({"loss": stage.tables["dense_loss"]} for stage in (self.before, self.after))
        prompts = self.before.arrays["caption_ids"]
        found = paired_bootstrap(lambda means: {"log": np.log(means["loss"])}, old, new, prompts)
        if found is None:
            return Change(0.0, change, None, self.no_interval)
        low, high = (float(np.expm1(end)) for end in found["log"])
        return Change(0.0, change, (low, high), scale=1.0)

    @property
    def dense_loss(self) -> Change:
        """The loss without masking."""
        before, after = (stage.dense_loss if stage else math.nan for stage in (self.before, self.after))
        ends = self._intervals.get("dense_loss")
        return Change(before, after, (float(ends[0]), float(ends[1])) if ends else None, self.no_interval)


@dataclass(frozen=True)
class SinkComparison:
    """Sink frequencies at two stages, on the same probes.

    Args:
        before: stage.
        after: stage.
    """

    before: SinkStage | None
    after: SinkStage | None

    @cached_property
    def no_interval(self) -> str:
        """Why differences have no interval; empty if they have one."""
        if self.before is None or self.after is None:
            return "one of the stages was not measured"
        if any(not {"caption_ids", "fraction"} <= set(stage.arrays) for stage in (self.before, self.after)):
            return "the run kept no caption numbers"
        different = _different(self.before.arrays, self.after.arrays, _SINK_SETTINGS)
        return different or few_prompts(self.before.arrays["caption_ids"])

    def change(self, head: Head) -> Change:
        """The mean over sigmas of a head's sink frequency."""
        before, after = (
            float(stage.select(stage.frequency, head).mean()) if stage else math.nan
            for stage in (self.before, self.after)
        )
        if self.no_interval or self.before is None or self.after is None or not math.isfinite(after - before):
            return Change(before, after, None, self.no_interval or "not measured")
        shares = [stage.select(stage.with_sink, head).mean(axis=1) for stage in (self.before, self.after)]
        ends = share_difference(shares[0], shares[1], self.before.arrays["caption_ids"])
        return Change(before, after, ends and (float(ends[0]), float(ends[1])))
