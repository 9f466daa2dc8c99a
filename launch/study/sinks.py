"""`reblock study sinks`: which heads have an attention sink, how often, where, and with what values."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from launch.study.figures import curves
from launch.study.settings import StudySettings
from launch.study.sink_figures import Panel, panels
from launch.study.sink_records import check_eps, head_names, record
from launch.study.sink_tables import RECORDS, PassSinks
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench
from trainer.attention import EPS
from trainer.callbacks.activations import MAGNITUDE, TIMES_MEDIAN
from trainer.callbacks.positions import PERMUTATIONS

#: A finding of positions below this is called one.
_LEVEL = 0.05
#: Figures of steps show so many layers at most; the table of heads has all.
_MOST_LAYERS = 8

_SHARED_NOISE = (
    "The prompts share their noise: intervals over prompts say nothing of other noise, and sinks that follow the noise "
    "lie at the same tokens for all prompts.",
)


class Sinks(Study):
    """Options of the study of sinks.

    Args:
        eps: thresholds above which an attention weight is heavy.
        default_eps: the one that sentences and figures use.
        most: heads in the table of the most important keys.
    """

    name = "sinks"
    question = "Which heads have an attention sink, how often, where, and with what values?"

    def __init__(self, *, eps: tuple[float, ...] = EPS, default_eps: float = 0.3, most: int = 12) -> None:
        self.eps, self.default_eps, self.most = tuple(eps), default_eps, most

    def check(self, work: Workbench) -> None:
        check_eps(self.eps, self.default_eps)
        if self.most < 1:
            raise ValueError(f"got most {self.most}, expected at least 1.")

    def variants(self, work: Workbench) -> list[str]:
        return [RECORDS]

    def effort(self, settings: StudySettings) -> Effort:
        return Effort(repeats=1)

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        return Measured(record(work, unit.prompt, unit.seed, self.eps))

    def findings(self, results: Results, work: Workbench) -> Findings:
        found = Findings()
        passes = [PassSinks(results, name, work, self.eps, self.default_eps) for name in work.passes]
        prompts = len(set(results.prompts))
        found.values |= {
            "base": str(work.base), "default_eps": self.default_eps, "steps": work.measured_steps,
            "sink_heads": {each.name: head_names(each.consistent) for each in passes},
            "heads": {each.name: each.values() for each in passes},
        }  # fmt: skip
        for each in passes:
            found.sentences += [self._verdict(each, prompts), *self._where(each), self._importance(each)]
        found.sentences += [_massive(each) for each in passes]
        self._tables(found, passes, prompts)
        self._figures(found, passes, work, results)
        found.limits += [
            "Only vision keys are judged. Cross-attention, where a family has it, has no vision key and is left out.",
            "A uniform head over fewer than 1 / eps keys would count as a sink at that eps: read small eps with the "
            "number of tokens in mind.",
            "Small values at a sink say that it adds little. What the model loses without the head is another "
            "question: `reblock study skip-sinks`.",
            *_SHARED_NOISE * (not work.config.own_noise and prompts > 1),
            "A large key importance alone is no sink: few queries with all of their weight give it too.",
        ]
        return found

    # -- sentences ---------------------------------------------------------------------------------------------------

    def _verdict(self, seen: PassSinks, prompts: int) -> str:
        total, heads, others = seen.frequency.size, seen.consistent, len(set(seen.ever) - set(seen.consistent))
        if not seen.ever:
            share = seen["fraction"].mean(axis=(0, 1))
            row, column = np.unravel_index(share.argmax(), share.shape)
            return (
                f"{_title(seen)}: none of {total} heads has a sink at eps {self.default_eps:g} on any call. The "
                f"largest heavy share is {share[row, column]:.3g}, at {seen.layers[row]}:{seen.heads[column]}; a sink "
                "has over 0.5."
            )
        named = f" ({', '.join(head_names(heads))})" if heads else ""
        text = (
            f"{_title(seen)}: {len(heads)} of {total} heads{named} have a sink at eps {self.default_eps:g} on at least "
            f"90 % of {prompts} prompts, at no less than 90 % of {seen.verdict.shape[1]} steps; {others} others have "
            "one on some calls."
        )
        if heads:
            ratios = [
                [seen.mean(figure, head) for head in heads]
                for figure in ("value_norm_ratio", "projected_value_norm_ratio")
            ]
            text += (
                f" The norm of the sink token's value is {_span(ratios[0])} times the mean of the other tokens', "
                f"{_span(ratios[1])} times after the output projection."
            )
        return text

    def _where(self, seen: PassSinks) -> list[str]:
        if not seen.ever:
            return []
        if seen.drawings < 2:
            return [
                f"{_title(seen)}: whether sinks prefer latent frames or places is not tested. All drawings share a "
                "prompt or the noise; draw several prompts with --own_noise true."
            ]
        p = seen.position_p()
        frames, places = (
            f"sinks lie unevenly (p = {value:.2g})"
            if value < _LEVEL
            else f"no uneven spread is shown (p = {value:.2g})"
            for value in (p["frame_p"], p["place_p"])
        )
        return [
            f"{_title(seen)}, over {seen.drawings} drawings that share neither prompt nor noise: over latent frames, "
            f"{frames}; over places in the frame, {places}."
        ]

    def _importance(self, seen: PassSinks) -> str:
        importance = seen["importance"].mean(axis=(0, 1))
        row, column = np.unravel_index(importance.argmax(), importance.shape)
        return (
            f"{_title(seen)}, by key importance (a key's column mass over the mean column mass, 1 for a uniform head): "
            f"the largest is {importance[row, column]:.3g} at {seen.layers[row]}:{seen.heads[column]}, the median "
            f"head's {np.median(importance):.3g}. By the verdict above, that head has a sink on "
            f"{seen.frequency[row, column]:.0%} of the calls."
        )

    # -- tables ------------------------------------------------------------------------------------------------------

    def _tables(self, found: Findings, passes: Sequence[PassSinks], prompts: int) -> None:
        interval = f"low and high: Wilson's 95 % interval; each of {prompts} prompts is one trial."
        rows = [row for each in passes for row in each.head_rows()]
        if rows:
            same = np.concatenate([each["key"][each.verdict] == each["alpha_key"][each.verdict] for each in passes])
            found.tables["heads"] = Table(
                f"Heads that have a sink at eps {self.default_eps:g} on any call",
                ("pass", "layer", "head", "frequency", "low", "high", "consistent", "heavy share", "alpha",
                 "value norm ratio", "projected", "usual key (t, y, x)", "its share", "frame p", "place p"),
                rows,
                f"frequency: share of prompts and steps. {interval} Shares, alpha and ratios are means over the calls "
                f"with a sink. The ratios are those of the key with the largest alpha, on {same.mean():.0%} of the "
                f"calls the sink itself. {_position_note(passes[0], len(rows))}",
            )  # fmt: skip
        found.tables["eps"] = Table(
            "Heads with sinks by eps",
            ("pass", "eps", "consistent heads", "heads on any call", "largest frequency", "low", "high"),
            [row for each in passes for row in each.eps_rows()],
            f"{interval} A uniform head gives each of {int(np.prod(passes[0].grid))} vision tokens at most "
            f"{1 / np.prod(passes[0].grid):.2g}.",
        )
        found.tables["importance"] = Table(
            "The most important vision keys, by head",
            ("pass", "layer", "head", "importance", "lowest", "highest", "usual key (t, y, x)", "its share",
             "of text", "sink frequency"),
            [row for each in passes for row in each.importance_rows(self.most)],
            "Column mass of the head's most important vision key over the mean column mass of all keys: mean, lowest "
            "and highest over prompts and steps. of text: the same of its most important text key, 0 without text.",
        )  # fmt: skip
        found.tables["activations"] = Table(
            "Largest entries of the residual stream, vision tokens, after each block",
            ("pass", "layer", "largest", "median", "largest / median", "massive", "usual token (t, y, x)",
             "its share", "usual channel", "its share "),
            [row for each in passes for row in each.stream_rows()],
            f"Magnitudes, means over prompts and steps. massive: share of calls with an entry above {MAGNITUDE:g} and "
            f"above {TIMES_MEDIAN:g} times the median.",
        )  # fmt: skip

    # -- figures -----------------------------------------------------------------------------------------------------

    def _figures(self, found: Findings, passes: Sequence[PassSinks], work: Workbench, results: Results) -> None:
        found.figures["frequency"] = (
            f"Sink frequency of every head at eps {self.default_eps:g}: share of prompts and steps.",
            _by_head([(each, each.frequency) for each in passes], "frequency", (0.0, 1.0)),
        )
        some = [each for each in passes if each.ever]
        if some:
            found.figures["steps"] = self._steps(passes)
            found.figures["prompts"] = (
                "Sink frequency by prompt (and seed): share of steps, for heads that have a sink on any call.",
                panels(
                    [[Panel(each.of_heads(each.verdict.mean(axis=1)), each.name, "layer:head", "prompt-seed",
                            head_names(each.ever), [f"{p}-{s}" for p, s in results.pairs])] for each in some],
                    value_label="frequency", limits=(0.0, 1.0),
                ),
            )  # fmt: skip
        for each in some:
            frames, places = each.counts()
            total = int(places.sum())
            found.figures[f"positions-{each.name}"] = (
                f"Where {total} sinks lie, {each.name} pass: share of a head's sinks by latent frame (evenly spread: "
                f"{1 / each.grid[0]:.2g}), and share of all sinks by place (evenly spread: {1 / places.size:.2g}).",
                panels([[
                    Panel(frames / frames.sum(axis=1, keepdims=True), "by head and frame", "latent frame",
                          "layer:head", range(each.grid[0]), head_names(each.ever)),
                    Panel(places / total, "by place", "x (tokens)", "y (tokens)", range(each.grid[2]),
                          range(each.grid[1])),
                ]], value_label="share of sinks"),
            )  # fmt: skip
        found.figures["importance"] = (
            "Key importance of every head's most important vision key, log10 (0 for a uniform head).",
            _by_head([(each, np.log10(each["importance"].mean(axis=(0, 1)))) for each in passes], "log10 importance"),
        )
        found.figures["activations"] = (
            "Largest magnitude of the vision stream after each block over its median magnitude.",
            curves(
                {each.name: (each.layers, each.times_median, None) for each in passes},
                x_label="layer", y_label="largest / median", log=True,
            ),
        )  # fmt: skip

    def _steps(self, passes: Sequence[PassSinks]) -> tuple[str, Figure]:
        total = {layer: 0.0 for each in passes for layer, _ in each.ever}
        for each in passes:
            for layer in total:
                total[layer] += float(each.frequency[each.layers.index(layer)].sum())
        layers = sorted(sorted(total, key=lambda layer: (-total[layer], layer))[:_MOST_LAYERS])
        left = len(total) - len(layers)
        rows = [
            [
                Panel(each.verdict.mean(axis=0)[:, each.layers.index(layer)], f"layer {layer}, {each.name}", "head",
                      "step", each.heads, each.steps)
                for each in passes
            ]
            for layer in layers
        ]  # fmt: skip
        more = f" {left} more layers are in the table." if left else ""
        text = f"Share of prompts with a sink, by step and head, for layers that have any.{more}"
        return text, panels(rows, value_label="frequency", limits=(0.0, 1.0))


def _title(seen: PassSinks) -> str:
    return f"{seen.name.capitalize()} pass"


def _span(values: Sequence[float]) -> str:
    """Least and largest of some values."""
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _position_note(seen: PassSinks, heads: int) -> str:
    """What the p-values of a table of heads mean."""
    if seen.drawings < 2:
        return "p: n/a where all drawings share a prompt or the noise."

    def least(cells: int) -> str:
        # How often permutations put the sinks of all drawings together, if each drawing has them in one cell.
        return f"{max(float(cells) ** (1 - seen.drawings), 1 / (1 + PERMUTATIONS)):.2g}"

    frames, height, width = seen.grid
    return (
        f"p: permutation test of evenly spread sinks over {seen.drawings} drawings that share neither prompt nor noise "
        "(all seeds of a prompt with noise of its own are one drawing); all sinks of a drawing are permuted together. "
        f"Where all drawings agree p is about {least(frames)} over {frames} frames and {least(height * width)} over "
        f"{height * width} places. By chance, up to {_LEVEL:.0%} of the {heads} heads have a p below {_LEVEL:g}."
    )


def _massive(seen: PassSinks) -> str:
    times = seen.times_median
    massive = ", ".join(str(row[1]) for row in seen.stream_rows() if row[5] == 1.0)
    most = int(times.argmax())
    return (
        f"{_title(seen)}, residual stream: after layer {seen.layers[most]} the largest entry is {times[most]:.3g} "
        f"times the median, after the median layer {np.median(times):.3g} times. "
        f"{f'Massive on every call after layers: {massive}' if massive else 'It is massive on every call of no layer'}."
    )


def _by_head(
    maps: Sequence[tuple[PassSinks, NDArray]], value_label: str, limits: tuple[float, float] | None = None
) -> Figure:
    """Heat maps of (layers, heads), one for each pass."""
    row = [Panel(values, f"{seen.name} pass", "head", "layer", seen.heads, seen.layers) for seen, values in maps]
    return panels([row], value_label=value_label, limits=limits)
