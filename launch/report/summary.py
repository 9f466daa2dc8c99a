"""The report's summary of a run: a few key figures, and sentences that explain the results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.report.charts import number
from launch.report.results import Head, RunResults, SinkStage, stage_title

#: Largest number of heads that a sentence lists by name.
_MAX_NAMED = 6


Verdict = Literal["good", "bad", ""]


@dataclass(frozen=True)
class KeyFigure:
    """A figure at the top of the page.

    Args:
        value: the figure as text.
        label: description of the figure.
        verdict: good, bad, or empty for no verdict.
    """

    value: str
    label: str
    verdict: Verdict = ""


def list_heads(heads: Sequence[Head]) -> str:
    """Lists heads as text, e.g. "layer 6 head 1, layer 7 head 0"."""
    return ", ".join(f"layer {layer} head {head}" for layer, head in heads)


def signed_percent(share: float) -> str:
    """A share as "+1.2 %", with a true minus; n/a if it is not finite."""
    return f"{100 * share:+.1f} %".replace("-", "−") if math.isfinite(share) else "n/a"


def _with_frequency(stage: SinkStage, heads: Sequence[Head]) -> str:
    parts = [
        f"{list_heads([head])} (mean frequency {stage.select(stage.frequency, head).mean():.2f})" for head in heads
    ]
    return ", ".join(parts)


def _others(results: RunResults, stage: SinkStage, flagged: Sequence[Head]) -> str:
    rest = [head for head in stage.with_any_sink() if head not in stage.flagged and head not in results.planted_heads]
    text = (
        f"Flagged too, though not planted: {_with_frequency(stage, flagged)}."
        if flagged
        else "No other head is flagged."
    )
    if len(rest) > _MAX_NAMED:
        most = max(float(stage.select(stage.frequency, head).mean()) for head in rest)
        return f"{text} {len(rest)} heads have a sink in some prompts only (mean frequency at most {most:.2f})."
    return text + (f" With a sink in some prompts only: {_with_frequency(stage, rest)}." if rest else "")


def _planted(results: RunResults) -> str:
    if not results.planted:
        return "No planted sinks are on record: the base has no planted.json."
    record = results.planted_record or {}
    note = f" Its note: {record['note']}" if record.get("note") else ""
    return (
        f"The base's sinks were planted on purpose, {len(results.planted)} of them "
        f"({list_heads(results.planted_heads)}), so that there is a known defect to cure.{note}"
    )


def _before(results: RunResults) -> str:
    before = results.before
    if before is None:
        return "The base's own sinks were not measured."
    if not results.planted:
        return f"Before: flagged at ε = {before.eps:g}: {list_heads(before.flagged) or 'no head'}."
    return (
        f"Before: {results.found_before} of {len(results.planted)} planted heads found with a sink in every prompt at "
        f"every noise level (frequency 1.0 at ε = {before.eps:g}). {_others(results, before, results.others_before)}"
    )


def _after(results: RunResults) -> str:
    after = results.after
    if after is None:
        return "Sinks after training were not measured."
    if not results.planted:
        return f"After {stage_title(after.stage)}: flagged: {list_heads(after.flagged) or 'no head'}."
    frequencies = [after.select(after.frequency, head) for head in results.planted_heads]
    if np.isnan(frequencies).any():
        return f"After {stage_title(after.stage)}: planted heads lie in layers that were not measured."
    verdict = (
        f"still sinks: {list_heads(results.planted_after)}" if results.planted_after else "no planted head is a sink"
    )
    return (
        f"After {stage_title(after.stage)}: {verdict}; their highest frequency at any noise level is "
        f"{np.max(frequencies):.2f}. {_others(results, after, results.others_after)}"
    )


def _masking(results: RunResults) -> str:
    before, after = results.masking_before, results.masking_after
    if before is None or after is None:
        return "Robustness to masking was not measured both before and after training."
    ratios = [number(stage.value("critical_ratio")) for stage in (before, after)]
    losses = [number(float(stage.arrays["dense_loss"]), 4) for stage in (before, after)]
    return (
        "Critical ratio of the retrained blocks together, the share of their smallest attention weights that can go "
        f"at 1 % more loss: {ratios[0]} before, {ratios[1]} after {stage_title(after.stage)}. "
        f"Dense loss on the same probes: {losses[0]} before, {losses[1]} after."
    )


def _loss(results: RunResults) -> str:
    if not results.series("val/loss")[1]:
        return "No validation loss was logged."
    if not math.isfinite(results.val_loss):
        return "The last validation loss is not a finite number."
    record = results.planted_record or {}
    if results.loss_difference is None:
        return (
            f"Validation loss of the retrained model: {number(results.val_loss, 4)}; the base's own is not on record."
        )
    return (
        f"Validation loss: {number(float(record['val_loss_before']), 4)} for the base before planting, "
        f"{number(float(record.get('val_loss_after') or math.nan), 4)} with the sinks planted, "
        f"{number(results.val_loss, 4)} retrained: {signed_percent(results.loss_difference)} against the base "
        "before planting."
    )


def _frozen(results: RunResults) -> str:
    if results.frozen_equal is None:
        return "No fingerprint of the frozen weights was taken."
    return f"The frozen weights {'stayed bit-identical' if results.frozen_equal else 'CHANGED during training'}."


def sentences(results: RunResults) -> list[str]:
    """Explains the results, with one or two sentences for each subject."""
    lines = [_planted(results), _before(results), _after(results), _masking(results), _loss(results), _frozen(results)]
    skipped = results.series("train/skipped")[1]
    if skipped and skipped[-1]:
        lines.append(f"{skipped[-1]:.0f} steps were skipped for a non-finite loss or gradient.")
    return lines


def key_figures(results: RunResults) -> list[KeyFigure]:
    """The figures at the top of the page, of those results that were measured."""
    shown = []
    planted = len(results.planted)
    if planted and results.before:
        verdict: Verdict = "good" if results.found_before == planted else "bad"
        shown.append(KeyFigure(f"{results.found_before} / {planted}", "planted sinks found before", verdict))
    if planted and results.after:
        left = len(results.planted_after)
        label = "of them still sinks after retraining"
        shown.append(KeyFigure(f"{left} / {planted}", label, "bad" if left else "good"))
    if results.masking_before and results.masking_after:
        before, after = (m.value("critical_ratio") for m in (results.masking_before, results.masking_after))
        verdict = "good" if after > before else "bad" if after < before else ""
        label = "critical ratio of masking, before → after"
        shown.append(KeyFigure(f"{number(before, 2)} → {number(after, 2)}", label, verdict))
    if results.loss_difference is not None:
        verdict = "good" if results.loss_difference <= 0.05 else "bad"
        label = "validation loss against the base before planting"
        shown.append(KeyFigure(signed_percent(results.loss_difference), label, verdict))
    return shown
