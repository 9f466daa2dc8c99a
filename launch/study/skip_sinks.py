"""`reblock study skip-sinks`: what the model loses without its sink heads, against as many random others.

Legend: P (prompt, seed) pairs, S kept steps.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch.study.distances import distances
from launch.study.figures import curves
from launch.study.settings import StudySettings
from launch.study.sink_records import Head, check_eps, find_sinks, head_names
from launch.study.skipped_heads import (
    OTHER,
    SAME,
    SINKS,
    TITLES,
    check_heads,
    heads_of,
    read_sink_heads,
    shortfalls,
    skip,
)
from launch.study.statistics import interval_note, mean_interval, with_ends
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench
from trainer.callbacks.intervals import excludes_zero
from trainer.models.planted_sinks import parse_heads

_DISTANCES = {"psnr": "PSNR (dB)", "ssim": "SSIM", "coarse": "coarse", "colour": "colour"}


class SkipSinks(Study):
    """Options of the study of skipped sink heads.

    Args:
        sinks: `findings.json` of the study of sinks, whose sink heads (of any pass) are skipped.
        sink_heads: the heads to skip, `LAYER:HEAD` each; without both, heads that are consistent on the kept calls of
            all prompts and seeds are found first.
        eps: threshold above which an attention weight is heavy, where sinks are found first.
        draws: random controls of each kind.
        draw_seed: of the random controls.
        video_draws: how many of the controls of each kind are drawn as whole videos, too; 0 draws no video at all.
    """

    name = "skip-sinks"
    question = "What does the model lose without its sink heads, and without as many random other heads?"

    def __init__(
        self,
        *,
        sinks: Path | None = None,
        sink_heads: tuple[str, ...] | None = None,
        eps: float = 0.3,
        draws: int = 3,
        draw_seed: int = 0,
        video_draws: int = 1,
    ) -> None:
        self.sinks, self.sink_heads, self.eps = sinks, sink_heads, eps
        self.draws, self.draw_seed, self.video_draws = draws, draw_seed, video_draws
        self._heads: list[Head] | None = None

    def check(self, work: Workbench) -> None:
        check_eps([self.eps], self.eps)
        if self.sinks is not None and self.sink_heads is not None:
            raise ValueError("got sinks and sink_heads, expected one of them, or none to have sinks found first.")
        if self.draws < 1 or self.draw_seed < 0 or not 0 <= self.video_draws <= self.draws:
            raise ValueError(
                f"got draws {self.draws}, draw_seed {self.draw_seed}, video_draws {self.video_draws}, expected at "
                "least one draw, a seed of at least 0, and 0 to draws videos."
            )
        if self.sinks is not None:
            self._heads = read_sink_heads(self.sinks)
        elif self.sink_heads is not None:
            self._heads = sorted(parse_heads(self.sink_heads))
        if self._heads is not None:
            check_heads(self._heads, work.layers, work.studied_heads)

    def variants(self, work: Workbench) -> list[str]:
        return [SINKS, *(f"{kind}-{draw}" for kind in (SAME, OTHER) for draw in range(self.draws))]

    def effort(self, settings: StudySettings) -> Effort:
        found_first = self.sinks is None and self.sink_heads is None
        videos = 1 + 2 * self.video_draws if self.video_draws else 0
        return Effort(videos=videos, repeats=found_first + 1 + 2 * self.draws)

    def heads(self, work: Workbench) -> list[Head]:
        """The sink heads: those given, or those found on the kept calls of all prompts and seeds."""
        if self._heads is None:
            self._heads = find_sinks(work, self.eps)
        return self._heads

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        sinks = self.heads(work)
        skipped = heads_of(unit.variant, sinks, work.layers, work.studied_heads, self.draw_seed)
        arrays = {"sinks": _mask(sinks, work), "skipped": _mask(skipped, work)}
        if not skipped:
            return Measured(arrays)
        functions = skip(skipped)
        found: dict[str, list[float]] = {}
        for call in work.dense(unit.prompt, unit.seed).calls:
            for name, error in work.relative_errors(call, functions).items():
                found.setdefault(f"D_{name}", []).append(error)
        arrays |= {name: np.array(errors) for name, errors in found.items()}  # (S,)
        draw = unit.variant.partition("-")[2] or "0"
        if int(draw) >= self.video_draws:
            return Measured(arrays)
        video = work.draw(unit.prompt, unit.seed, functions)
        far = distances(video, work.dense(unit.prompt, unit.seed).pixels)
        return Measured(arrays | {name: np.array(value) for name, value in far.items()}, video)

    # -- what the results say ----------------------------------------------------------------------------------------

    def findings(self, results: Results, work: Workbench) -> Findings:
        found, sinks = Findings(), self._sinks_of(results)
        found.values |= {"base": str(work.base), "sink_heads": head_names(sinks)}
        found.limits += [
            "Skipping is an intervention that the model was never trained with: a large D shows that the head's output "
            "matters as it is, not that the model needs the head after training on.",
            "Intervals are over prompts, for the heads that were drawn; the range over draws is beside them.",
            "Layers without sinks lie elsewhere in the model: their control mixes what a head is with where it is.",
            "D at a step leaves out how errors add up over steps; the videos show that.",
            "Where a family normalises the attention output after its projection, skipping also rescales other heads.",
        ]
        if not sinks:
            found.sentences.append(
                f"No head of the studied layers is a sink at eps {self.eps:g}"
                f"{' by what was given' if self.sinks or self.sink_heads is not None else ''}: nothing was skipped and "
                "there are no figures."
            )
            return found
        kinds = [kind for kind in (SINKS, SAME, OTHER) if results.stack(self._variants(kind)[0], "skipped").any()]
        short = shortfalls(sinks, work.layers, work.studied_heads)
        found.sentences += [self._sentence(results, name, sinks, kinds) for name in work.passes] + short
        self._errors(found, results, work, kinds)
        self._videos(found, results, kinds)
        return found

    def _variants(self, kind: str) -> list[str]:
        return [SINKS] if kind == SINKS else [f"{kind}-{draw}" for draw in range(self.draws)]

    def _sinks_of(self, results: Results) -> list[Head]:
        """The sink heads that every unit was measured with.

        Raises:
            ValueError: if units differ.
        """
        masks = [results[unit]["sinks"] for unit in results]
        if any(not np.array_equal(mask, masks[0]) for mask in masks):
            raise ValueError(
                "got results that were measured with different sink heads: the file of sinks, or the seeds, changed in "
                "between. Give the heads as --sink_heads, or use another --out."
            )
        return _heads(masks[0])

    def _errors_of(self, results: Results, kind: str, name: str) -> NDArray:
        """D of a pass, (draws, P, S)."""
        return np.stack([results.stack(variant, f"D_{name}") for variant in self._variants(kind)])

    def _sentence(self, results: Results, name: str, sinks: Sequence[Head], kinds: Sequence[str]) -> str:
        def by_pair(kind: str) -> NDArray:
            return self._errors_of(results, kind, name).mean(axis=(0, 2))

        mean, low, high = mean_interval(by_pair(SINKS), results.prompts)
        text = (
            f"{name.capitalize()} pass: without the {len(sinks)} sink heads ({', '.join(head_names(sinks))}) the "
            f"prediction changes by D = {with_ends(float(mean), float(low), float(high))}"
        )
        for kind in kinds[1:]:
            control = by_pair(kind)
            _, *ends = _floats(mean_interval(control - by_pair(SINKS), results.prompts))
            shown = "shown" if excludes_zero((ends[0], ends[1])) else "not shown"
            times = _times(control, by_pair(SINKS))
            much = f"{times:,.0f}" if 100 <= times < math.inf else f"{times:.3g}"
            text += f"; without {TITLES[kind]} by {control.mean():.3g}, {much} times as much"
            text += "" if math.isnan(ends[0]) else f" (that the two differ is {shown} over prompts)"
        return f"{text}. {interval_note(results.prompts)}"

    def _errors(self, found: Findings, results: Results, work: Workbench, kinds: Sequence[str]) -> None:
        rows: list[list[object]] = []
        lines = {}
        for name in work.passes:
            sinks = self._errors_of(results, SINKS, name).mean(axis=(0, 2))
            for kind in kinds:
                errors = self._errors_of(results, kind, name)
                own = errors.mean(axis=(0, 2))
                draws = errors.mean(axis=(1, 2))
                count = results.stack(self._variants(kind)[0], "skipped")[0].sum()
                difference = "" if kind == SINKS else with_ends(*_floats(mean_interval(own - sinks, results.prompts)))
                mean, low, high = _floats(mean_interval(own, results.prompts))
                found.values.setdefault("D", {}).setdefault(name, {})[kind] = {"D": mean, "low": low, "high": high}
                rows.append([
                    name, TITLES[kind], int(count), with_ends(mean, low, high),
                    float(draws.min()), float(draws.max()), difference, _times(own, sinks),
                ])  # fmt: skip
                line, *ends = mean_interval(errors.mean(axis=0), results.prompts)
                lines[f"{TITLES[kind]}, {name}"] = (work.measured_steps, line, (ends[0], ends[1]))
        found.tables["errors"] = Table(
            "Change of the prediction without some heads",
            ("pass", "skipped", "heads", "D", "least draw", "largest draw", "minus sinks'", "times sinks'"),
            rows,
            "D = |v − v_0|² / |v_0|² on the inputs of the dense trajectory, mean over steps and draws; minus sinks': "
            f"paired by prompt. {interval_note(results.prompts)}",
        )
        found.figures["errors"] = (
            "Change of the prediction by denoising step; the shades are intervals over prompts.",
            curves(lines, x_label="denoising step", y_label="D", log=True),
        )
        found.tables["heads"] = Table(
            "Heads that were skipped",
            ("skipped", "draw", "heads"),
            [
                [TITLES[kind], draw, ", ".join(head_names(_heads(results.stack(variant, "skipped")[0])))]
                for kind in kinds for draw, variant in enumerate(self._variants(kind))
            ],
        )  # fmt: skip

    def _videos(self, found: Findings, results: Results, kinds: Sequence[str]) -> None:
        if not self.video_draws:
            return
        tables = {
            kind: {
                name: np.mean([results.stack(v, name) for v in self._variants(kind)[: self.video_draws]], axis=0)
                for name in _DISTANCES
            }
            for kind in kinds
        }
        rows = [[TITLES[kind], *self._cells(tables[kind], results)] for kind in kinds]
        for kind in kinds[1:]:
            difference = {name: tables[kind][name] - tables[SINKS][name] for name in _DISTANCES}
            rows.append([f"{TITLES[kind]}: minus sinks'", *self._cells(difference, results)])
        found.tables["videos"] = Table(
            "Whole videos against the dense ones",
            ("skipped", *_DISTANCES.values()),
            rows,
            interval_note(results.prompts),
        )

    def _cells(self, table: dict[str, NDArray], results: Results) -> list[str]:
        return [with_ends(*_floats(mean_interval(table[name], results.prompts))) for name in _DISTANCES]


def _floats(values: Sequence[NDArray]) -> tuple[float, float, float]:
    mean, low, high = (float(value) for value in values)
    return mean, low, high


def _times(errors: NDArray, others: NDArray) -> float:
    """How many times larger the mean of some errors is than that of others."""
    return float(errors.mean() / others.mean()) if others.mean() else math.inf


def _mask(heads: Sequence[Head], work: Workbench) -> NDArray:
    """(blocks, heads of a block), true at these heads."""
    mask = np.zeros((work.facts.num_blocks, work.heads), bool)
    for head in heads:
        mask[head] = True
    return mask


def _heads(mask: NDArray) -> list[Head]:
    return [(int(layer), int(head)) for layer, head in np.argwhere(mask)]
