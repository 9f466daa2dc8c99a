"""`reblock report`: writes one self-contained page about a run from the files in its folder.

Legend: Ly measured layers, h heads.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from data.files import write_text
from launch.report.charts import Series, heat_map, line_chart, number
from launch.report.comparisons import ends_text
from launch.report.masking_page import (
    blanks,
    critical_chart,
    masking_chart,
    mass_chart,
    probes_note,
    scope_table,
)
from launch.report.results import RunResults, last_epoch, read_results
from launch.report.samples import data_uri, sample_groups
from launch.report.stages import Ends, Head, SinkStage, stage_title
from launch.report.summary import key_figures, sentences
from launch.run_folder import RunFolder


def report(run: Path, *, out: Path | None = None) -> Path:
    """Writes one self-contained HTML page: summary, losses, sinks, masking, samples, provenance, recipe.

    Args:
        run: run folder of `reblock fit`.
        out: file to write; RUN/report.html by default.

    Returns:
        Path of the file.

    Raises:
        ValueError: if `run` is no run folder.
    """
    folder = RunFolder(run)
    results = read_results(folder)
    path = out or folder.report
    environment = Environment(loader=PackageLoader("launch"), autoescape=True, undefined=StrictUndefined)
    page = environment.get_template("report.html.j2").render(_page(results))
    write_text(path, page)
    print(f"report: {path.resolve()}")
    return path


def _page(results: RunResults) -> dict[str, Any]:
    sinks = results.before or results.after
    masking = results.masking_before or results.masking_after
    return {
        "name": results.run.path.resolve().name,
        "base": results.base,
        "comparison": results.run.comparison.name if results.run.comparison.is_file() else None,
        "key_figures": key_figures(results),
        "sentences": sentences(results),
        "charts": {name: Markup(chart) if chart else None for name, chart in _charts(results).items()},
        "heat": [_heat(title, stage, results) for title, stage in _compared(results)],
        "eps": number(sinks.eps) if sinks else None,
        "heads": _heads(results),
        "blanks": blanks(results),
        "scopes": scope_table(results),
        "probes": probes_note(masking),
        "samples": sample_groups(results),
        "fingerprint": results.fingerprint,
        "versions": _versions(results.versions),
        "commands": _commands(results),
        "config": results.config,
        "figures": _figures(results),
    }


# -- charts ----------------------------------------------------------------------------------------------------------


def running_mean(y: Sequence[float]) -> list[float]:
    """Mean over the window that ends at each point and spans 1/50 of the curve; NaN if it has no finite value."""
    values = np.asarray(y, float)
    window = max(1, len(values) // 50)
    known = np.isfinite(values)
    total = np.cumsum(np.insert(np.where(known, values, 0.0), 0, 0.0))
    count = np.cumsum(np.insert(known, 0, 0))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    with np.errstate(invalid="ignore", divide="ignore"):
        return list((total[end] - total[start]) / (count[end] - count[start]))


def _charts(results: RunResults) -> dict[str, str | None]:
    return {
        "loss": _loss_chart(results),
        "bands": _band_chart(results),
        "sinks_by_epoch": _epoch_chart({k: len(s.flagged) for k, s in results.sinks.items()}, "sink heads"),
        "critical": critical_chart(results),
        "distortion": masking_chart(results, "distortion"),
        "increase": masking_chart(results, "loss_increase"),
        "increase_by_mass": mass_chart(results),
    }


def _loss_chart(results: RunResults) -> str | None:
    (steps, train), (val_steps, val) = results.series("train/loss"), results.series("val/loss")
    series = []
    if train:
        series += [
            Series("", steps, train, 1, "faint"),
            Series("training (the objective), running mean", steps, running_mean(train), 1),
        ]
    if val:
        series.append(Series("validation (flow loss), EMA weights", val_steps, val, 2, "dots"))
    return line_chart(series, x_label="optimiser step", y_label="loss") if series else None


def _band_chart(results: RunResults) -> str | None:
    names = sorted({key for row in results.metrics for key in row if key.startswith("train/loss_sigma_")})
    series = []
    for index, name in enumerate(names):
        steps, values = results.series(name)
        if values:
            label = "σ " + name.removeprefix("train/loss_sigma_").replace("-", " to ")
            series.append(Series(label, steps, running_mean(values), index % 4 + 1))
    return line_chart(series, x_label="optimiser step", y_label="loss") if series else None


def _epoch_chart(values: Mapping[str, float], y_label: str) -> str | None:
    """Chart of a value over the epochs, with the base's value as a dashed line; None for less than two epochs."""
    epochs = sorted((int(stage.removeprefix("epoch-")), v) for stage, v in values.items() if stage.startswith("epoch-"))
    if len(epochs) < 2:
        return None
    x = [epoch for epoch, _ in epochs]
    series = [Series("retrained, by epoch (0: freshly initialised)", x, [value for _, value in epochs], 1, "dots")]
    if "base" in values:
        series.append(Series("base", [x[0], x[-1]], [values["base"]] * 2, 2, "dashed"))
    return line_chart(series, x_label="epoch", y_label=y_label, height=240)


def _compared(results: RunResults) -> list[tuple[str, SinkStage]]:
    before = [("Before: the base's own weights", results.before)] if results.before else []
    return before + ([(f"After {stage_title(results.after.stage)}", results.after)] if results.after else [])


def _heat(title: str, stage: SinkStage, results: RunResults) -> dict[str, Any]:
    rows = {layer: row for row, layer in enumerate(stage.layers)}
    ringed = {(rows[layer], head) for layer, head in results.planted_heads if layer in rows}
    svg = heat_map(stage.frequency.mean(axis=0), [f"layer {layer}" for layer in stage.layers], marked=ringed)
    arrays = stage.arrays
    note = (
        f"{len(arrays['keys'])} prompts, {len(arrays['sigmas'])} noise levels, {int(arrays['queries'])} queries and "
        f"{int(arrays['keys_count'])} keys at most."
    )
    return {"title": title, "svg": Markup(svg), "note": f"{note} {_positions(stage)}"}


def _positions(stage: SinkStage) -> str:
    """Whether sinks prefer a latent frame or a place in the frame."""
    if "frame_p" not in stage.arrays:
        return "Whether sinks prefer a position was not measured."
    over_frames, over_places = (float(stage.arrays[name]) for name in ("frame_p", "place_p"))
    if math.isnan(over_frames):
        return "No sink, so no position to test."
    return (
        f"Evenly spread sinks would lie as unevenly with p = {number(over_frames, 2)} over latent frames and "
        f"p = {number(over_places, 2)} over places in the frame (permutations by prompt)."
    )


# -- tables ----------------------------------------------------------------------------------------------------------


def _heads(results: RunResults) -> list[tuple[list[str], str, str]]:
    """Cells, change in words and verdict of each planted head, then of each that is flagged before or after."""
    planted = dict(zip(results.planted_heads, results.planted, strict=True))
    flagged = [head for stage in (results.before, results.after) if stage for head in stage.flagged]
    return [_head_row(results, head, planted.get(head, {})) for head in dict.fromkeys([*planted, *flagged])]


def _head_row(results: RunResults, head: Head, entry: Mapping[str, Any]) -> tuple[list[str], str, str]:
    def mean(stage: SinkStage | None, name: str) -> str:
        values = stage.select(stage.arrays[name], head) if stage else np.array([np.nan])
        return number(float(np.nanmean(values))) if np.isfinite(values).any() else "n/a"

    def frequency(stage: SinkStage | None, pick: Any) -> str:
        found: tuple[float, Ends | None] = stage.frequency_at(head, pick) if stage else (math.nan, None)
        return number(found[0]) + (ends_text(found[1]) if math.isfinite(found[0]) else "")

    cells = [f"layer {head[0]}, head {head[1]}"]
    cells += [number(float(entry.get(key, math.nan))) for key in ("gain", "verified_frequency")]
    cells += [frequency(results.before, np.argmin), frequency(results.after, np.argmax)]
    for name in ("alpha", "value_norm_ratio"):
        cells += [mean(results.before, name), mean(results.after, name)]
    change = results.sink_comparison.change(head)
    return cells, change.words, change.verdict(-1)


# -- the rest --------------------------------------------------------------------------------------------------------


def _versions(versions: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    if not versions:
        return []
    rows = [("Python", str(versions.get("python"))), ("commit", str(versions.get("git") or "not in a checkout"))]
    hardware = versions.get("hardware")
    if isinstance(hardware, dict):
        rows += [(key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in hardware.items() if v]
    elif hardware:
        rows.append(("hardware", str(hardware)))
    packages = versions.get("packages") or {}
    return [*rows, ("packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version))]


def _commands(results: RunResults) -> list[str]:
    command = (results.versions or {}).get("command")
    fit = [command] if command else ["# the command of the fit was not recorded"]
    return [*fit, shlex.join(["reblock", "report", str(results.run.path)])]


def _figures(results: RunResults) -> list[dict[str, str]]:
    """PNG figures of the stages base, epoch-000 and the last epoch."""
    stages = {"base", "epoch-000", last_epoch(results.sinks), last_epoch(results.masking)} - {None}
    paths = sorted(results.run.figures.glob("*.png"))
    return [
        {"name": path.stem, "uri": data_uri(path, "image/png")}
        for path in paths
        if any(path.stem.endswith(f"-{stage}") for stage in stages)
    ]
