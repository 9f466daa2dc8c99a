"""What the page of a comparison shows: tables, sentences, charts and samples."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from launch.compare.groups import RunGroup
from launch.compare.measured import FIGURES, Difference, Figure, Measured, difference
from launch.report.charts import Panel, Series, line_chart, number, panel_chart
from launch.report.comparisons import ends_text
from launch.report.samples import sample_groups
from launch.report.summary import list_heads
from trainer.callbacks.masking_statistics import TOLERATED

#: Most runs of which the samples are shown side by side.
_SAMPLED = 6


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Args:
        name: first cell.
        cells: the others, each with its verdict: good, bad, or empty.
    """

    name: str
    cells: list[tuple[str, str]]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs with their measurements; the first one is the reference.

    Args:
        groups: the groups.
        measured: what each has measured.
        base: the base's own weights, as the first run of the reference measured them.
        layers: the layers that are masked together.
    """

    groups: Sequence[RunGroup]
    measured: Sequence[Measured]
    base: Measured
    layers: Sequence[int]

    @property
    def names(self) -> list[str]:
        """Names of the groups."""
        return [group.name for group in self.groups]

    def differences(self, name: str) -> list[Difference]:
        """How each group but the first differs from the first in a figure."""
        return [difference(name, self.measured[0], measured) for measured in self.measured[1:]]


def recipe_rows(comparison: Comparison) -> list[Row]:
    """Name, runs, steps, and where the recipe differs from the reference's."""
    rows = []
    for group in comparison.groups:
        differs = group.differs_from(comparison.groups[0])
        text = "the reference" if group is comparison.groups[0] else "; ".join(differs) or "nothing"
        rows.append(Row(group.name, [(", ".join(group.names), ""), (group.steps, ""), (text, "")]))
    return rows


def figure_rows(comparison: Comparison) -> list[Row]:
    """A row for the base and for each group, with a cell for each figure."""
    named = [("base, no training", comparison.base), *zip(comparison.names, comparison.measured, strict=True)]
    return [Row(name, [(figure_text(measured.figures[key]), "") for key in FIGURES]) for name, measured in named]


def figure_text(figure: Figure) -> str:
    """A figure with its interval over prompts, and its spread over runs; or why it is missing."""
    if math.isnan(figure.value):
        return "blank" if "uniform control" in figure.reason else "n/a"
    text = number(figure.value) + ends_text(figure.over_prompts)
    if len(figure.by_run) > 1:
        measured = [value for value in figure.by_run if not math.isnan(value)]
        text += f"; runs {number(min(measured))} to {number(max(measured))}" if measured else "; runs n/a"
        if blank := len(figure.by_run) - len(measured):
            text += f", {blank} blank"
    return text


def difference_rows(comparison: Comparison) -> list[Row]:
    """A row for each figure of each group but the first: over prompts, and over seeds."""
    rows = []
    for key, (title, better) in FIGURES.items():
        for name, found in zip(comparison.names[1:], comparison.differences(key), strict=True):
            verdict = found.over_prompts.verdict(better) if better else ""
            seeds = (found.over_runs.words, found.over_runs.verdict(better) if better else "") if found.over_runs \
                else ("one run on a side, or a run without the figure", "")  # fmt: skip
            rows.append(Row(title, [(name, ""), (found.over_prompts.words, verdict), seeds]))
    return rows


def sentences(comparison: Comparison) -> list[str]:
    """The findings: sinks of each group, and its loss against the base's and the reference's."""
    heads = comparison.measured[0].heads
    lines = []
    if heads:
        lines.append(f"Heads whose sinks are followed: {list_heads(heads)}.")
    for name, measured in zip(comparison.names, comparison.measured, strict=True):
        parts = [part for part in (_sinks(measured), _loss(comparison.base, measured)) if part]
        lines.append(f"{name}: {'; '.join(parts) or 'nothing was measured at the end'}.")
    for group in comparison.groups:
        if group.shared_seeds:
            lines.append(
                f"{group.name}: runs share {', '.join(group.shared_seeds)}, so an interval over seeds leaves out what "
                "these draw."
            )
    return lines


def _sinks(measured: Measured) -> str:
    if not measured.sinks:
        return ""
    if not measured.heads:
        flagged = [len(stage.flagged) for stage in measured.sinks]
        return f"sink heads: {', '.join(map(str, flagged))}"
    left = [len([head for head in stage.flagged if head in measured.heads]) for stage in measured.sinks]
    others = [len(stage.flagged) - count for stage, count in zip(measured.sinks, left, strict=True)]
    return (
        f"{', '.join(map(str, left))} of {len(measured.heads)} followed heads are sinks, "
        f"{', '.join(map(str, others))} others"
    )


def _loss(base: Measured, measured: Measured) -> str:
    change = difference("dense_loss", base, measured).over_prompts
    if math.isnan(change.after):
        return ""
    return f"loss on the probes {number(change.after, 4)}, against the base {change.words}"


def loss_chart(comparison: Comparison) -> str | None:
    """Validation loss by step of every run, a colour for each group."""
    series = []
    for index, group in enumerate(comparison.groups):
        for place, results in enumerate(group.runs):
            steps, values = results.series("val/loss")
            if values:
                label = group.name if place == 0 else ""
                series.append(Series(label, steps, values, index % 4 + 1, "dots" if index < 4 else "dashed"))
    return line_chart(series, x_label="optimiser step", y_label="validation loss, EMA") if series else None


def critical_chart(comparison: Comparison) -> str | None:
    """Critical ratio, loss and uniform control of the base and every group: the first says nothing without the rest."""
    measured = [comparison.base, *comparison.measured]
    if not any(each.masking for each in measured):
        return None

    def dots(label: str, key: str, colour: int) -> Series:
        found = [each.figures[key] for each in measured]
        ends = np.array([figure.over_prompts or (math.nan, math.nan) for figure in found]).T
        values = [figure.value for figure in found]
        return Series(label, list(range(len(found))), values, colour, "marks", (ends[0], ends[1]))

    panels = [
        Panel([dots("r* at 1 % of the base's loss", "critical_ratio_of_base", 3)], "critical ratio r*", height=140),
        Panel([dots("loss on the probes", "dense_loss", 2)], "loss L", height=100),
        Panel([dots("control", "uniform_cost", 1)], "uniform ΔL / L", "percent", (TOLERATED, "1 %"), height=100),
    ]
    names = ["base", *(str(place) for place in range(1, len(measured)))]
    return panel_chart(
        panels, x_label="base, then the groups in the order of the tables", x_ticks=list(enumerate(names))
    )


def samples(comparison: Comparison) -> list[dict[str, Any]]:
    """Videos of each caption and seed: the base's of the first run that has it, then the retrained of every run."""
    found: dict[tuple[str, int], list[dict[str, str]]] = {}
    runs = [(group, results) for group in comparison.groups for results in group.runs][:_SAMPLED]
    for _, results in runs:
        for shown in sample_groups(results):
            clips = found.setdefault((shown["caption"], shown["seed"]), [])
            for clip in shown["clips"]:
                if clip["variant"].startswith("base"):
                    if not any(other["variant"] == clip["variant"] for other in clips):
                        clips.append(clip)
                else:
                    name = results.run.path.resolve().name
                    clips.append(clip | {"title": f"{name}: {clip['title']}"})
    return [{"caption": caption, "seed": seed, "clips": clips} for (caption, seed), clips in found.items()]
