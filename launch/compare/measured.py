"""What the runs of a group measured at their last stage, and how two groups differ.

Every figure has two kinds of intervals: over prompts, for these runs and other prompts; and over runs, for other seeds,
where a group has several runs.

Legend: P samples, S sigmas, K scopes, R ratios, Ly measured layers, h heads.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launch.report.comparisons import Change, MaskingComparison
from launch.report.results import RunResults
from launch.report.stages import Arrays, Ends, Head, MaskingStage, SinkStage
from trainer.callbacks.intervals import (
    few_prompts,
    paired_bootstrap,
    run_difference,
    share_difference,
    wilson_interval,
)
from trainer.callbacks.masking_statistics import PER_PROBE, masking_figures

#: Figure -> what tables call it, and the direction that is better (0: neither).
FIGURES: dict[str, tuple[str, int]] = {
    "val_loss": ("validation loss", -1),
    "dense_loss": ("loss on the probes", -1),
    "sink_frequency": ("sink frequency of the followed heads", -1),
    "sink_heads": ("sink heads in these layers", -1),
    "critical_ratio_of_base": ("r* at 1 % of the base's loss", 1),
    "critical_ratio": ("r* at 1 % of the own loss", 0),
    "uniform_cost": ("uniform control ΔL / L", 0),
}

#: Arrays that must be equal for two measurements to be of the same probes.
_PROBES = ("keys", "sigmas", "caption_ids")


@dataclass(frozen=True)
class Figure:
    """A figure of a group.

    Args:
        value: over all runs and probes; NaN if it was not measured or is left blank.
        by_run: of each run.
        over_prompts: its interval; None without one.
        reason: why `value` is NaN.
    """

    value: float
    by_run: tuple[float, ...]
    over_prompts: Ends | None = None
    reason: str = ""


@dataclass(frozen=True)
class Measured:
    """The measurements of one stage of several runs.

    Args:
        masking: of each run, restricted to one scope as by `one_scope`; empty if a run lacks it.
        sinks: of each run; empty if a run lacks it.
        val_losses: of each run; NaN for a run without one.
        heads: the heads whose sinks are followed: those planted, or those flagged in the base.
        layers: the layers whose sink heads are counted.
    """

    masking: tuple[MaskingStage, ...]
    sinks: tuple[SinkStage, ...]
    val_losses: tuple[float, ...]
    heads: tuple[Head, ...]
    layers: tuple[int, ...]

    @cached_property
    def mean_masking(self) -> MaskingStage | None:
        """The stage of the mean over runs of every probe's losses; None if it was not measured."""
        return _mean_stage(self.masking) if self.masking else None

    @property
    def sink_shares(self) -> NDArray | None:
        """Of each sample: the share of (run, head, sigma) with a sink, over `heads`, (P,); None if not measured."""
        if not self.sinks or not self.heads or not all(_measures(stage, self.heads) for stage in self.sinks):
            return None
        return np.mean(
            [stage.select(stage.with_sink, head).mean(axis=1) for stage in self.sinks for head in self.heads], axis=0
        )

    @cached_property
    def figures(self) -> Mapping[str, Figure]:
        """Every figure of `FIGURES`."""
        found = {"val_loss": Figure(float(np.mean(self.val_losses)), self.val_losses, None, "no validation loss")}
        found["dense_loss"] = self._of_masking("dense_loss")
        found["sink_frequency"], found["sink_heads"] = self._sink_frequency(), self._sink_heads()
        return found | {
            name: self._of_masking(name) for name in ("critical_ratio_of_base", "critical_ratio", "uniform_cost")
        }

    def _of_masking(self, name: str) -> Figure:
        stage = self.mean_masking
        if stage is None:
            return Figure(math.nan, (), None, "masking was not measured in these layers, or not of every probe")
        if name == "dense_loss":
            by_run = tuple(each.dense_loss for each in self.masking)
            return Figure(stage.dense_loss, by_run, stage.dense_loss_interval)
        by_run = tuple(each.value(name) for each in self.masking)
        blank = stage.blank(name) if name.startswith("critical") else ""
        return Figure(stage.value(name), by_run, stage.interval(name), blank)

    def _sink_frequency(self) -> Figure:
        shares = self.sink_shares
        if shares is None:
            reason = "no head to follow" if self.sinks and not self.heads else "not measured in these layers"
            return Figure(math.nan, (), None, reason)
        by_run = tuple(
            float(np.mean([stage.select(stage.with_sink, head).mean() for head in self.heads])) for stage in self.sinks
        )
        prompts = self.sinks[0].arrays["caption_ids"]
        if few_prompts(prompts):
            return Figure(float(shares.mean()), by_run)
        number = len(np.unique(prompts))
        low, high = wilson_interval(shares.mean() * number, number)
        return Figure(float(shares.mean()), by_run, (float(low), float(high)))

    def _sink_heads(self) -> Figure:
        if not self.layers:
            return Figure(math.nan, (), None, "the reference does not say which layers it retrains")
        if not self.sinks or not all(set(self.layers) <= set(stage.layers) for stage in self.sinks):
            return Figure(math.nan, (), None, "not measured in these layers")
        counts = tuple(float(sum(layer in self.layers for layer, _ in stage.flagged)) for stage in self.sinks)
        return Figure(float(np.mean(counts)), counts)


@dataclass(frozen=True)
class Difference:
    """A figure of a group against the same figure of the reference.

    Args:
        over_prompts: with an interval for these runs and other prompts.
        over_runs: with an interval for other seeds; None where a side has only one run.
    """

    over_prompts: Change
    over_runs: Change | None


def difference(name: str, reference: Measured, group: Measured) -> Difference:
    """How a figure of `group` differs from that of `reference`."""
    before, after = reference.figures[name], group.figures[name]
    ends, reason = _prompt_interval(name, reference, group)
    missing = next((figure.reason for figure in (before, after) if math.isnan(figure.value)), "")
    by_run = run_difference(before.by_run, after.by_run)
    scale = None if name.endswith("_loss") else 1.0  # the others are shares
    over_runs = Change(before.value, after.value, by_run, scale=scale) if by_run else None
    return Difference(Change(before.value, after.value, ends, missing or reason, scale), over_runs)


def _prompt_interval(name: str, reference: Measured, group: Measured) -> tuple[Ends | None, str]:
    """The paired interval over prompts, and why there is none."""
    if name in ("val_loss", "sink_heads"):
        return None, "one number per run, so no interval over prompts"
    if name == "sink_frequency":
        shares = reference.sink_shares, group.sink_shares
        if shares[0] is None or shares[1] is None:
            return None, "not measured"
        arrays = reference.sinks[0].arrays, group.sinks[0].arrays
        different = _other_probes(*arrays) or few_prompts(arrays[0]["caption_ids"])
        ends = None if different else share_difference(shares[0], shares[1], arrays[0]["caption_ids"])
        return (float(ends[0]), float(ends[1])) if ends else None, different
    stages = reference.mean_masking, group.mean_masking
    if stages[0] is None or stages[1] is None:
        return None, "not measured"
    if name == "dense_loss":  # does not depend on what is masked
        different = _other_probes(stages[0].arrays, stages[1].arrays) or few_prompts(stages[0].arrays["caption_ids"])
        if different:
            return None, different
        found = paired_bootstrap(
            lambda means: {"dense_loss": means["dense_loss"]}, stages[0].tables, stages[1].tables,
            stages[0].arrays["caption_ids"],
        )  # fmt: skip
        return (float(found["dense_loss"][0]), float(found["dense_loss"][1])) if found else None, ""
    change = MaskingComparison(*stages).change(name)
    return change.interval, change.reason


def same_probes(one: Arrays, other: Arrays) -> bool:
    """Whether two measurements name the same probes."""
    return set(_PROBES) <= set(one) and set(_PROBES) <= set(other) and not _other_probes(one, other)


def _other_probes(one: Arrays, other: Arrays) -> str:
    differ = [name for name in _PROBES if not np.array_equal(one[name], other[name])]
    return f"the groups differ in {', '.join(differ)} of the probes" if differ else ""


def _measures(stage: SinkStage, heads: Sequence[Head]) -> bool:
    return "caption_ids" in stage.arrays and {layer for layer, _ in heads} <= set(stage.layers)


# -- stages of several runs ------------------------------------------------------------------------------------------


def one_scope(stage: MaskingStage | None, layers: Sequence[int]) -> MaskingStage | None:
    """A stage restricted to the scope that masks exactly `layers`, under the name `retrained`.

    None if that was not measured, or not of every probe. A stage of an earlier version does not say which layers a
    scope has; its scope `retrained` is then taken for `layers`.
    """
    if stage is None or not set(PER_PROBE) <= set(stage.tables) or not set(_PROBES) <= set(stage.arrays):
        return None
    index = _scope_of(stage, layers)
    if index is None:
        return None
    tables = {
        name: table if name in ("energy", "dense_loss") else table[:, :, [index]]
        for name, table in stage.tables.items()
    }
    return _stage_of(stage, tables)


def _scope_of(stage: MaskingStage, layers: Sequence[int]) -> int | None:
    if "scope_layers" not in stage.arrays:
        return stage.scopes.index("retrained") if "retrained" in stage.scopes else None
    for index, masked in enumerate(stage.arrays["scope_layers"]):
        if np.flatnonzero(masked).tolist() == list(layers):
            return index
    return None


def _stage_of(stage: MaskingStage, tables: Arrays) -> MaskingStage:
    """A stage of one scope with other losses of every probe, and the figures that follow from them."""
    settings = {name: stage.arrays[name] for name in (*_PROBES, "ratios", "masked_keys", "quantile", "removed")
                if name in stage.arrays}  # fmt: skip
    means = {name: np.asarray(table, np.float64).mean(axis=(0, 1)) for name, table in tables.items()}
    arrays = {
        **settings,
        "scopes": np.array(["retrained"]),
        **masking_figures(means, stage.arrays["ratios"]),
        **{f"{name}_by_probe": table for name, table in tables.items()},
    }
    return MaskingStage(stage.stage, arrays, stage.base_loss)


def _mean_stage(stages: Sequence[MaskingStage]) -> MaskingStage:
    """The stage of the mean over runs of every probe's losses; all are of one scope.

    Raises:
        ValueError: if the runs were measured on different probes.
    """
    if len(stages) == 1:
        return stages[0]
    for stage in stages[1:]:
        if different := _other_probes(stages[0].arrays, stage.arrays):
            raise ValueError(
                f"got runs of one recipe that {different.removeprefix('the groups ')}; expected the same held-out "
                "samples in all, so that they can be averaged. Leave out those of other data."
            )
    names = set.intersection(*(set(stage.tables) for stage in stages))
    tables = {name: np.mean([stage.tables[name] for stage in stages], axis=0) for name in names}
    mean = _stage_of(stages[0], tables)
    return MaskingStage(mean.stage, mean.arrays, float(np.mean([stage.base_loss for stage in stages])))


def retrained_layers(results: RunResults) -> list[int] | None:
    """The layers of a run's scope `retrained`; None if the run does not say."""
    for stage in results.masking.values():
        if "scope_layers" in stage.arrays and "retrained" in stage.scopes:
            return np.flatnonzero(stage.arrays["scope_layers"][stage.scopes.index("retrained")]).tolist()
    return None


def followed_heads(results: RunResults) -> tuple[Head, ...]:
    """Planted heads; without any, the heads that are flagged in the base."""
    return tuple(results.planted_heads or (results.before.flagged if results.before else ()))


def measure_base(results: RunResults, layers: Sequence[int], heads: Sequence[Head]) -> Measured:
    """The base's own weights, as a run measured them before its first step."""
    masking = one_scope(results.masking_before, layers)
    sinks = (results.before,) if results.before else ()
    # A run does not validate the base. What planted.json says of it was measured on other samples.
    return Measured((masking,) if masking else (), sinks, (math.nan,), tuple(heads), tuple(layers))


def measure_runs(runs: Sequence[RunResults], layers: Sequence[int], heads: Sequence[Head]) -> Measured:
    """The last stage of each run."""
    masking = [one_scope(results.masking_after, layers) for results in runs]
    sinks = [results.after for results in runs]
    return Measured(
        tuple(stage for stage in masking if stage) if all(masking) else (),
        tuple(stage for stage in sinks if stage) if all(sinks) else (),
        tuple(results.val_loss for results in runs),
        tuple(heads),
        tuple(layers),
    )
