"""What a run's figures mean, in sentences and tiles. Every sentence follows from `Findings`; nothing is assumed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.report.charts import number
from launch.report.findings import Findings, Head, SinkStage, stage_title

_NAMED = 6  # heads that a sentence names one by one


@dataclass(frozen=True)
class Tile:
    """One large figure.

    Args:
        value: the figure.
        label: what it is.
        mood: good, bad, or empty for a figure without a verdict.
    """

    value: str
    label: str
    mood: Literal["good", "bad", ""] = ""


def names(heads: Sequence[Head]) -> str:
    """Layer 6 head 1, layer 7 head 0."""
    return ", ".join(f"layer {layer} head {head}" for layer, head in heads)


def signed_percent(share: float) -> str:
    """+1.2 %, with a true minus."""
    return f"{100 * share:+.1f} %".replace("-", "−") if math.isfinite(share) else "n/a"


def _with_frequency(stage: SinkStage, heads: Sequence[Head]) -> str:
    parts = [f"{names([head])} (mean frequency {stage.of(stage.frequency, head).mean():.2f})" for head in heads]
    return ", ".join(parts)


def _others(found: Findings, stage: SinkStage, flagged: Sequence[Head]) -> str:
    rest = [head for head in stage.ever() if head not in stage.flagged and head not in found.planted_heads]
    text = (
        f"Flagged too, though not planted: {_with_frequency(stage, flagged)}."
        if flagged
        else "No other head is flagged."
    )
    if len(rest) > _NAMED:
        most = max(float(stage.of(stage.frequency, head).mean()) for head in rest)
        return f"{text} {len(rest)} heads have a sink in some prompts only (mean frequency at most {most:.2f})."
    return text + (f" With a sink in some prompts only: {_with_frequency(stage, rest)}." if rest else "")


def _planted(found: Findings) -> str:
    if not found.planted:
        return "No planted sinks are on record: the base has no planted.json."
    record = found.planted_record or {}
    note = f" Its note: {record['note']}" if record.get("note") else ""
    return (
        f"The base's sinks were planted on purpose, {len(found.planted)} of them ({names(found.planted_heads)}), "
        f"so that there is a known defect to cure.{note}"
    )


def _before(found: Findings) -> str:
    before = found.before
    if before is None:
        return "The base's own sinks were not measured."
    if not found.planted:
        return f"Before: flagged at ε = {before.eps:g}: {names(before.flagged) or 'no head'}."
    return (
        f"Before: {found.found_before} of {len(found.planted)} planted heads found with a sink in every prompt at "
        f"every noise level (frequency 1.0 at ε = {before.eps:g}). {_others(found, before, found.others_before)}"
    )


def _after(found: Findings) -> str:
    after = found.after
    if after is None:
        return "Sinks after training were not measured."
    if not found.planted:
        return f"After {stage_title(after.stage)}: flagged: {names(after.flagged) or 'no head'}."
    frequencies = [after.of(after.frequency, head) for head in found.planted_heads]
    if np.isnan(frequencies).any():
        return f"After {stage_title(after.stage)}: planted heads lie in layers that were not measured."
    verdict = f"still sinks: {names(found.planted_after)}" if found.planted_after else "no planted head is a sink"
    return (
        f"After {stage_title(after.stage)}: {verdict}; their highest frequency at any noise level is "
        f"{np.max(frequencies):.2f}. {_others(found, after, found.others_after)}"
    )


def _masking(found: Findings) -> str:
    before, after = found.masking_before, found.masking_after
    if before is None or after is None:
        return "Robustness to masking was not measured both before and after training."
    ratios = [number(stage.value("critical_ratio")) for stage in (before, after)]
    losses = [number(float(stage.arrays["dense_loss"]), 4) for stage in (before, after)]
    return (
        "Critical ratio of the retrained blocks together, the share of their smallest attention weights that can go "
        f"at 1 % more loss: {ratios[0]} before, {ratios[1]} after {stage_title(after.stage)}. "
        f"Dense loss on the same probes: {losses[0]} before, {losses[1]} after."
    )


def _loss(found: Findings) -> str:
    if not found.series("val/loss")[1]:
        return "No validation loss was logged."
    if not math.isfinite(found.val_loss):
        return "The last validation loss is not a finite number."
    record = found.planted_record or {}
    if found.loss_difference is None:
        return f"Validation loss of the retrained model: {number(found.val_loss, 4)}; the base's own is not on record."
    return (
        f"Validation loss: {number(float(record['val_loss_before']), 4)} for the base before planting, "
        f"{number(float(record.get('val_loss_after') or math.nan), 4)} with the sinks planted, "
        f"{number(found.val_loss, 4)} retrained: {signed_percent(found.loss_difference)} against the base "
        "before planting."
    )


def _frozen(found: Findings) -> str:
    if found.frozen_equal is None:
        return "No fingerprint of the frozen weights was taken."
    return f"The frozen weights {'stayed bit-identical' if found.frozen_equal else 'CHANGED during training'}."


def sentences(found: Findings) -> list[str]:
    """The headline findings."""
    said = [_planted(found), _before(found), _after(found), _masking(found), _loss(found), _frozen(found)]
    skipped = found.series("train/skipped")[1]
    if skipped and skipped[-1]:
        said.append(f"{skipped[-1]:.0f} steps were skipped for a non-finite loss or gradient.")
    return said


def tiles(found: Findings) -> list[Tile]:
    """The figures at the top; what was not measured has no tile."""
    shown = []
    planted = len(found.planted)
    if planted and found.before:
        mood: Literal["good", "bad"] = "good" if found.found_before == planted else "bad"
        shown.append(Tile(f"{found.found_before} / {planted}", "planted sinks found before", mood))
    if planted and found.after:
        left = len(found.planted_after)
        shown.append(Tile(f"{left} / {planted}", "of them still sinks after retraining", "bad" if left else "good"))
    if found.masking_before and found.masking_after:
        before, after = (stage.value("critical_ratio") for stage in (found.masking_before, found.masking_after))
        mood_ratio: Literal["good", "bad", ""] = "good" if after > before else "bad" if after < before else ""
        shown.append(
            Tile(f"{number(before, 2)} → {number(after, 2)}", "critical ratio of masking, before → after", mood_ratio)
        )
    if found.loss_difference is not None:
        close = found.loss_difference <= 0.05
        label = "validation loss against the base before planting"
        shown.append(Tile(signed_percent(found.loss_difference), label, "good" if close else "bad"))
    return shown
