"""What the page shows of masking: charts, the table of scopes, and why a figure is blank.

Legend: K scopes, R ratios.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launch.report.charts import Panel, Series, line_chart, number, panel_chart
from launch.report.comparisons import ends_text
from launch.report.results import RunResults
from launch.report.stages import MaskingStage, stage_title
from trainer.callbacks.masking_statistics import TOLERATED

#: The two critical ratios, by what is tolerated.
CRITICAL_RATIOS = {
    "critical_ratio": "r* at 1 % of the own loss",
    "critical_ratio_of_base": "r* at 1 % of the base's loss",
}


def _stages_of(results: RunResults) -> list[MaskingStage]:
    """Masking of the base, then epoch by epoch, where the retrained blocks were masked together."""
    named = [stage for stage in results.masking if stage == "base" or stage.startswith("epoch-")]
    ordered = sorted(named, key=lambda stage: -1 if stage == "base" else int(stage.removeprefix("epoch-")))
    return [results.masking[stage] for stage in ordered if "retrained" in results.masking[stage].scopes]


def critical_chart(results: RunResults) -> str | None:
    """Critical ratios, dense loss and uniform control below each other: the first says nothing without the others."""
    stages = _stages_of(results)
    if not stages:
        return None
    x, nothing = list(range(len(stages))), (math.nan, math.nan)
    own = np.array([stage.dense_loss for stage in stages])

    def dots(label: str, y: NDArray, intervals: list, colour: int) -> Series:
        low, high = np.array([interval or nothing for interval in intervals]).T
        return Series(label, x, y, colour, "dots", (low, high))

    ratios = [
        dots(words, np.array([s.value(name) for s in stages]), [s.interval(name) for s in stages], colour)
        for (name, words), colour in zip(CRITICAL_RATIOS.items(), (1, 3), strict=True)
    ]
    losses = [dots("dense loss", own, [stage.dense_loss_interval for stage in stages], 2)]
    control = np.array([stage.value("uniform_cost") for stage in stages])
    controls = [
        dots("control, of the own loss", control, [stage.interval("uniform_cost") for stage in stages], 1),
        Series("control, of the base's loss", x, control * own / results.base_dense_loss, 3, "dashed"),
    ]
    panels = [
        Panel(ratios, "critical ratio r*", height=140),
        Panel(losses, "dense loss L", height=100),
        Panel(controls, "uniform ΔL / L", "percent", (TOLERATED, "1 %: below, r* is blank"), height=100),
    ]
    every = math.ceil(len(stages) / 12)
    names = [stage_title(stage.stage).removeprefix("epoch ") for stage in stages]
    ticks = [(float(place), name) for place, name in enumerate(names) if place % every == 0]
    return panel_chart(panels, x_label="stage: base, then epochs (0: before the first step)", x_ticks=ticks)


def blanks(results: RunResults) -> list[str]:
    """Where the chart of critical ratios has a gap, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for stage in _stages_of(results):
        for name, words in CRITICAL_RATIOS.items():
            reason = stage.blank(name)
            if reason:
                found.setdefault((words, reason), []).append(stage_title(stage.stage))
    return [f"{words}, {', '.join(stages)}: {reason}." for (words, reason), stages in found.items()]


def _masking_curves(results: RunResults, name: str) -> list[tuple[str, MaskingStage, NDArray, int]]:
    """(label, stage, curve (R,), colour) before and after; the increase of the loss relative to the dense loss."""
    found = []
    for label, stage, colour in (("before", results.masking_before, 2), ("after", results.masking_after, 1)):
        curve = stage.curve(name) if stage else None
        if stage is not None and curve is not None:
            unit = stage.dense_loss if name == "loss_increase" else 1.0
            found.append((label, stage, curve / unit, colour))
    return found


def masking_chart(results: RunResults, name: str) -> str | None:
    """`distortion` or `loss_increase` of the retrained blocks against the ratio, with the control."""
    series = []
    for label, stage, curve, colour in _masking_curves(results, name):
        ratios = stage.arrays["ratios"]
        series.append(Series(f"{label} ({stage_title(stage.stage)})", ratios, curve, colour, "dots"))
        unit = stage.dense_loss if name == "loss_increase" else 1.0
        uniform = np.full(len(ratios), stage.value(f"uniform_{name}") / unit)
        series.append(Series(f"uniform, {label}", ratios, uniform, colour, "dashed"))
    if not series:
        return None
    x_label = "share of attention weights removed, r"
    if name == "loss_increase":
        return line_chart(series, x_label=x_label, y_label="loss increase", scale="percent", rule=(0.01, "1 %"))
    return line_chart(series, x_label=x_label, y_label="relative squared change", scale="log")


def mass_chart(results: RunResults) -> str | None:
    """The increase of the loss against the attention that was removed: at one ratio it differs between stages."""
    series = []
    for label, stage, curve, colour in _masking_curves(results, "loss_increase"):
        mass = stage.curve("dropped_mass")
        if mass is not None:
            series.append(Series(f"{label} ({stage_title(stage.stage)})", mass, curve, colour, "dots"))
    if not series:
        return None
    return line_chart(
        series,
        x_label="mean share of a row's attention removed",
        y_label="loss increase by mass",
        scale="percent",
        x_scale="log",
        rule=(0.01, "1 %"),
    )


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        cells: masked layers, figure, before, after.
        change: between the two, in words.
        verdict: good, bad, or empty where there is no change or none that is either.
    """

    cells: list[str]
    change: str
    verdict: str = ""


#: Figure -> what the table calls it, and the direction that is better (0: neither).
_TABLE = {
    **{name: (words, 1) for name, words in CRITICAL_RATIOS.items()},
    "auc": ("robustness AUC", 0),  # lower is no better where attention costs nothing
    "uniform_cost": ("uniform control ΔL / L", 0),
}


def scope_table(results: RunResults) -> list[Row]:
    """The dense loss, and a row for each figure of each set of masked layers."""
    stages, comparison = (results.masking_before, results.masking_after), results.masking_comparison
    if not any(stages):
        return []
    losses = [number(s.dense_loss, 4) + ends_text(s.dense_loss_interval) if s else "n/a" for s in stages]
    loss = comparison.dense_loss
    rows = [Row(["none", "dense loss L", *losses], loss.words, loss.verdict(-1))]
    for scope in dict.fromkeys(scope for stage in stages if stage for scope in stage.scopes):
        for name, (words, better) in _TABLE.items():
            change = comparison.change(name, scope)
            cells = [_cell(stage, name, scope) for stage in stages]
            rows.append(Row([scope, words, *cells], change.words, change.verdict(better) if better else ""))
    return rows


def _cell(stage: MaskingStage | None, name: str, scope: str) -> str:
    """A figure with its interval, or why it is blank."""
    if stage is None:
        return "n/a"
    if name not in CRITICAL_RATIOS:
        return number(stage.value(name, scope)) + ends_text(stage.interval(name, scope))
    at_least = "≥ " if stage.value(name, scope) >= stage.arrays["ratios"][-1] else ""
    return stage.blank(name, scope) or (
        at_least + number(stage.value(name, scope)) + ends_text(stage.interval(name, scope))
    )


def probes_note(stage: MaskingStage | None) -> str:
    """How many probes, prompts and noise levels."""
    if stage is None:
        return ""
    prompts, samples = int(stage.arrays["prompts"]), int(stage.arrays["samples"])
    return f"Measured on {samples} held-out probes of {prompts} prompts at {len(stage.arrays['sigmas'])} noise levels."
