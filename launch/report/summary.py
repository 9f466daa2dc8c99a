"""The report's summary of a run: a few key figures, and sentences that explain the results."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from launch.report.charts import number
from launch.report.comparisons import Change
from launch.report.results import RunResults
from launch.report.stages import Head, MaskingStage, SinkStage, stage_title

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
    frequencies = _frequencies(after, results.planted_heads)
    if np.isnan(frequencies).any():
        return f"After {stage_title(after.stage)}: planted heads lie in layers that were not measured."
    verdict = (
        f"still sinks: {list_heads(results.planted_after)}" if results.planted_after else "no planted head is a sink"
    )
    return (
        f"After {stage_title(after.stage)}: {verdict}; their highest frequency at any noise level is "
        f"{np.max(frequencies):.2f}. {_others(results, after, results.others_after)}"
    )


def _sink_changes(results: RunResults) -> str:
    """How the frequency of planted heads, or of those flagged, has changed; heads of the same words together."""
    before, after = results.before, results.after
    if before is None or after is None:
        return ""
    heads = list(dict.fromkeys(results.planted_heads or [*before.flagged, *after.flagged]))
    groups: dict[str, list[Head]] = {}
    for head in heads:
        change = results.sink_comparison.change(head)
        words = {1: "higher", -1: "lower"}.get(change.direction) or change.words.partition(" [")[0]
        groups.setdefault(words, []).append(head)
    parts = [f"{words}: {list_heads(named)}" for words, named in groups.items()]
    return f"Sink frequency over all noise levels, after against before: {'; '.join(parts)}." if parts else ""


def _start_and_training(results: RunResults) -> str:
    """What is so before the first step already, by re-initialisation alone, and what training adds."""
    start, after, heads = results.untrained, results.after, results.planted_heads
    parts, meaning = [], ""
    if start is not None and after is not None and heads and not np.isnan(_frequencies(start, heads)).any():
        at_start, at_end = (len([head for head in stage.flagged if head in heads]) for stage in (start, after))
        parts.append(f"{at_start} of {len(heads)} planted heads are sinks then, {at_end} after training")
        if at_start < results.found_before:
            meaning = " Sinks that are gone before the first step were removed by re-initialisation, not by training"
            meaning += ", and training brought none back." if at_end == at_start == 0 else "."
    losses = [stage.dense_loss if stage else math.nan for stage in (results.masking_untrained, results.masking_after)]
    if np.isfinite(losses).all():
        parts.append(f"the dense loss is {number(losses[0], 4)} then, {number(losses[1], 4)} after training")
    return f"The retrained blocks before the first step: {'; '.join(parts)}.{meaning}" if parts else ""


def _frequencies(stage: SinkStage, heads: Sequence[Head]) -> np.ndarray:
    return np.array([stage.select(stage.frequency, head) for head in heads])


def _flagged(results: RunResults) -> str:
    """The sink heads before and after."""
    stages = (("before", results.before), ("after", results.after))
    parts = [f"flagged {word}: {list_heads(stage.flagged) or 'no head'}" for word, stage in stages if stage]
    return f"{'; '.join(parts)}." if parts else ""


def _masking(results: RunResults) -> str:
    before, after = results.masking_before, results.masking_after
    if before is None or after is None:
        return "Robustness to masking was not measured both before and after training."
    change, retrained = results.masking_comparison.change, "the retrained blocks together"
    relative = _signed(results.masking_comparison.relative_loss)
    return (
        f"Critical ratio of {retrained}, the share of their smallest attention weights that can go before and after "
        f"{stage_title(after.stage)}, at 1 % more of the own loss: {_told(results, 'critical_ratio')}; at 1 % of the "
        f"base's loss: {_told(results, 'critical_ratio_of_base')}. Dense loss on the same probes: "
        f"{_before_after(results.masking_comparison.dense_loss, 4)} ({relative}). Uniform control, of the own loss: "
        f"{_before_after(change('uniform_cost'))}."
    )


def _signed(relative: Change) -> str:
    """A relative change with its interval, as percentages."""
    return signed_percent(relative.after) + _within(relative)


def _within(relative: Change) -> str:
    ends = relative.interval
    return f" [{signed_percent(ends[0])}, {signed_percent(ends[1])}]" if ends else ""


def _before_after(change: Change, digits: int = 3) -> str:
    """Both figures, and the change if there is one."""
    return f"{number(change.before, digits)} before, {number(change.after, digits)} after, {change.words}"


def _or_blank(stage: MaskingStage | None, name: str, digits: int = 3) -> str:
    if stage is None:
        return "n/a"
    return "blank" if stage.blank(name) else number(stage.value(name), digits)


def _told(results: RunResults, name: str) -> str:
    """A critical ratio before and after, and why one is blank."""
    stages = [stage for stage in (results.masking_before, results.masking_after) if stage]
    reason = next((stage.blank(name) for stage in stages if stage.blank(name)), "")
    if reason:
        before, after = (_or_blank(stage, name) for stage in stages)
        return f"{before} before, {after} after ({reason})"
    return _before_after(results.masking_comparison.change(name))


def _loss(results: RunResults) -> str:
    if not results.series("val/loss")[1]:
        return "No validation loss was logged."
    if not math.isfinite(results.val_loss):
        return "The last validation loss is not a finite number."
    return (
        f"Validation loss of the retrained model: {number(results.val_loss, 4)}. A fit does not validate its base: the "
        "loss on the probes is what compares the two."
    )


def _frozen(results: RunResults) -> str:
    if results.frozen_equal is None:
        return "No fingerprint of the frozen weights was taken."
    return f"The frozen weights {'stayed bit-identical' if results.frozen_equal else 'CHANGED during training'}."


def sentences(results: RunResults) -> list[str]:
    """Explains the results, with one or two sentences for each subject."""
    parts = (_planted, _before, _after, _sink_changes, _start_and_training, _masking, _loss, _frozen)
    lines = [line for line in (part(results) for part in parts) if line]
    bare = results.without_captions
    if bare is not None:
        told = (_flagged(bare), _sink_changes(bare), _masking(bare))
        lines += [f"Without captions: {line}" for line in told if line]
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
        gone = all(results.sink_comparison.change(head).direction < 0 for head in results.planted_heads)
        shown.append(KeyFigure(f"{left} / {planted}", label, "bad" if left else "good" if gone else ""))
    if results.masking_before and results.masking_after:
        relative = results.masking_comparison.relative_loss
        within = _within(relative) or "; no interval"
        label = f"loss on the probes against the base{within}"
        shown.append(KeyFigure(signed_percent(relative.after), label, relative.verdict(-1)))
        shown.append(_critical_figure(results))
    return shown


def _critical_figure(results: RunResults) -> KeyFigure:
    """The critical ratio at a fixed tolerance, with what it depends on."""
    comparison = results.masking_comparison
    ratio, loss, control = (
        comparison.change("critical_ratio_of_base"),
        comparison.dense_loss,
        comparison.change("uniform_cost"),
    )
    label = (
        "critical ratio of masking at 1 % of the base's loss, before → after, "
        f"{ratio.words}; dense loss {number(loss.before)} → {number(loss.after)}, uniform control "
        f"{signed_percent(control.before)} → {signed_percent(control.after)}"
    )
    stages = (results.masking_before, results.masking_after)
    before, after = (_or_blank(stage, "critical_ratio_of_base", 2) for stage in stages)
    return KeyFigure(f"{before} → {after}", label, ratio.verdict(1))
