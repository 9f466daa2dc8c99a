"""`reblock study structure`: what attention maps look like, and what of that stays from prompt to prompt.

Legend: P (prompt, seed) pairs, F latent frames, Ly layers, h heads, S side of a compared map.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launch.study.denoising import CONDITIONAL
from launch.study.figures import curves, heat_map
from launch.study.map_figures import MapLines, map_panels
from launch.study.maps import SHARES, MapRecorder, MapSizes
from launch.study.settings import StudySettings
from launch.study.similarity import Compared, between_models, between_prompts, between_seeds
from launch.study.statistics import interval_note, mean_interval, with_ends
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench

_OWN, _OTHER = "maps", "other-maps"
#: Most heads and layers that a figure of maps draws.
_DRAWN_HEADS, _DRAWN_LAYERS = 8, 4

_TITLES = {
    "diagonal": "diagonal: share of attention among vision tokens that stays in the query's own cell",
    "stripes": "temporal stripes: share that goes to the same place in other frames",
    "own_frame": "own frame: share that stays in the query's frame, the diagonal included",
    "text": "share of attention that goes to text",
}


class Structure(Study):
    """Options of the study of structure.

    Args:
        side: largest side of the maps that are compared and drawn, in cells; every latent frame has as many cells.
        fine: largest side of the maps that the shares of diagonal and stripes are read from.
        shown_layers: layers whose maps are drawn; None takes four, evenly spread over the studied ones.
        other: a second base of the same layout, whose maps are compared with the first one's.
    """

    name = "structure"
    question = "What do attention maps look like, and do heads keep their maps under other prompts?"

    def __init__(
        self, *, side: int = 64, fine: int = 512, shown_layers: tuple[int, ...] | None = None, other: str | None = None
    ) -> None:
        self.side, self.fine, self.other = side, fine, other
        self.shown_layers = None if shown_layers is None else tuple(shown_layers)
        self._second: Workbench | None = None

    def check(self, work: Workbench) -> None:
        self.sizes(work).check()
        unknown = sorted(set(self.shown_layers or ()) - set(work.layers))
        if unknown or self.shown_layers == ():
            raise ValueError(
                f"got shown_layers {list(self.shown_layers or ())}, expected some of the studied layers {work.layers}."
            )
        if self.other is not None:
            second = self.second(work)
            said = [(w.use.family.title, w.facts.num_blocks, w.heads, w.grid) for w in (work, second)]
            if said[0] != said[1]:
                raise ValueError(
                    f"got bases of (family, blocks, heads, grid) {said[0]} and {said[1]}, expected equal ones: a "
                    "head's map is compared with that of the same layer and head."
                )

    # -- what is measured --------------------------------------------------------------------------------------------

    def sizes(self, work: Workbench) -> MapSizes:
        """Cells of the maps."""
        return MapSizes(work.grid, self.side, self.fine)

    def second(self, work: Workbench) -> Workbench:
        """The workbench of the other base."""
        if self._second is None:
            self._second = Workbench(work.config, self.other)
        return self._second

    @staticmethod
    def heads(work: Workbench) -> list[int]:
        """The studied heads."""
        return list(range(work.heads)) if work.config.heads is None else sorted(work.config.heads)

    def drawn(self, work: Workbench) -> list[int]:
        """Layers whose maps are drawn."""
        layers = work.layers
        if self.shown_layers is not None:
            return sorted(self.shown_layers)
        count = min(_DRAWN_LAYERS, len(layers))
        return sorted({layers[round(i * (len(layers) - 1) / max(1, count - 1))] for i in range(count)})

    @staticmethod
    def drawn_steps(work: Workbench) -> list[int]:
        """The first and the last of the measured steps."""
        return sorted({work.measured_steps[0], work.measured_steps[-1]})

    def variants(self, work: Workbench) -> list[str]:
        return [_OWN] if self.other is None else [_OWN, _OTHER]

    def effort(self, settings: StudySettings) -> Effort:
        other = self.other is not None
        return Effort(videos=int(other), repeats=1 + other)

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        bench = work if unit.variant == _OWN else self.second(work)
        steps: dict[str, list[NDArray]] = {}
        whole: list[NDArray] = []
        for call in bench.dense(unit.prompt, unit.seed).calls:
            shown = self.drawn(work) if call.step in self.drawn_steps(work) else []
            recorder = MapRecorder(self.sizes(work), self.heads(work), shown)
            bench.again(call, recorder.functions(work.layers))
            for row, name in enumerate(call.passes):
                for figure in ("map", "profile", "text_tokens", *SHARES):
                    steps.setdefault(f"{name}_{figure}", []).append(recorder.row(row, figure).numpy())
                if shown and name == CONDITIONAL:
                    whole.append(recorder.row(row, "whole").numpy())
        return Measured({name: np.stack(values) for name, values in steps.items()} | {"whole": np.stack(whole)})

    # -- what is found -----------------------------------------------------------------------------------------------

    def findings(self, results: Results, work: Workbench) -> Findings:
        found = Findings()
        self._similarity(found, results, work)
        _Shares(self, results, work).add(found)
        self._maps(found, results, work)
        found.limits += [
            "Maps of one pixel position to another share much whatever a head does. Only what a head has in common "
            "with itself beyond what it has in common with other heads is its own.",
            "Pooled maps do not show what happens within a cell. A sharp diagonal and a blurred one look alike where "
            "they fit into it.",
            "A map that stays the same under all prompts need not matter to the video: `transfer` and `masking` tell.",
        ]
        return found

    def _similarity(self, found: Findings, results: Results, work: Workbench) -> None:
        rows = []
        chance = 1 / (len(work.layers) * len(self.heads(work)))
        for name in work.passes:
            for figure in ("map", "profile"):
                compared = self._compared(results, f"{name}_{figure}")
                rows += [[name, figure, one.title, *_row(one), chance] for one in compared]
                if name == CONDITIONAL and compared:
                    self._say(found, compared[0], figure, work)
        columns = [
            "pass", "of", "compared with", "same head", "other heads of the layer", "all other heads",
            "same − other heads of the layer", "recognised", "by chance",
        ]  # fmt: skip
        note = (
            "Pearson correlation of a head's map in one drawing with a map of the other drawing; means over heads, "
            "layers and steps. Other heads are the null: what any two maps share. Recognised: how often no other head "
            "of all is as like a head as it is itself. " + interval_note(results.prompts)
        )
        found.tables["similarity"] = Table("Are maps of one head alike?", columns, rows, note)
        if len(work.config.seeds) < 2:
            found.limits.append("With one seed nothing is said of other noise; use --seeds [0,1].")

    def _compared(self, results: Results, name: str) -> list[Compared]:
        """All comparisons of an array, that between prompts first."""

        def maps(variant: str) -> dict[tuple[int, int], NDArray]:
            return {pair: results[Unit(*pair, variant)][name] for pair in results.pairs}

        own = maps(_OWN)
        found = [between_prompts(own), between_prompts(own, same_seed=False), between_seeds(own)]
        found += [] if self.other is None else [between_models(own, maps(_OTHER))]
        return [one for one in found if one is not None]

    def _say(self, found: Findings, one: Compared, figure: str, work: Workbench) -> None:
        same, others, gap = one.overall("same"), one.overall("layer_others"), one.overall("same", "layer_others")
        what = "pooled map" if figure == "map" else "profile over frame offsets"
        found.sentences.append(
            f"{one.title.capitalize()}: a head's {what} correlates {with_ends(*same)} with its own, and "
            f"{with_ends(*others)} with those of other heads of its layer (the difference: {with_ends(*gap)})."
        )
        found.values[f"similarity_{figure}"] = {
            name: dict(zip(("mean", "low", "high"), values, strict=True))
            for name, values in (("same", same), ("layer_others", others), ("difference", gap))
        }
        if figure != "map":
            return
        lines = {}
        for name, title in (("same", "same head"), ("layer_others", "other heads of the layer")):
            mean, low, high = one.by_layer(name)
            lines[title] = (work.layers, mean, (low, high))
        found.figures["similarity-layers"] = (
            f"Correlation of pooled maps with those of the {one.title}, by layer, beside that of other heads (chance). "
            "Conditional pass, means over heads and steps.",
            curves(lines, x_label="layer", y_label="correlation of maps"),
        )
        found.figures["similarity-heads"] = (
            f"By how much a head's map is more like its own ({one.title}) than like those of other heads of its layer.",
            heat_map(
                one.by_head("same", "layer_others"), x_label="head", y_label="layer", x_ticks=self.heads(work),
                y_ticks=work.layers, value_label="same − other heads",
            ),
        )  # fmt: skip

    def _maps(self, found: Findings, results: Results, work: Workbench) -> None:
        prompt, seed = results.pairs[0]
        arrays = results[Unit(prompt, seed, _OWN)]
        layers, heads = self.drawn(work), self.heads(work)[:_DRAWN_HEADS]
        text = int(arrays[f"{CONDITIONAL}_text_tokens"].flat[0])
        lines = MapLines.of(self.sizes(work), text)
        for place, step in enumerate(self.drawn_steps(work)):
            panels = [[arrays["whole"][place, i, j] for j in range(len(heads))] for i in range(len(layers))]
            found.figures[f"maps-step-{step:02d}"] = (
                f"Maps at step {step} of “{work.prompts[prompt]}”, seed {seed}: queries downwards, keys to the right. "
                "White lines: latent frames. Red line: the border of vision and text, where text is among the keys. "
                "Colour: log10 of the weight as a multiple of uniform attention.",
                map_panels(panels, [f"layer {n}" for n in layers], [f"head {n}" for n in heads], lines),
            )
        shown = [prompt for prompt, own in results.pairs if own == seed][:_DRAWN_LAYERS]
        if len(shown) > 1:
            steps = arrays[f"{CONDITIONAL}_map"].shape[0]
            places = [work.layers.index(layer) for layer in layers]
            columns = [(i, j % len(heads)) for j, i in enumerate(places)]
            panels = [
                [results[Unit(p, seed, _OWN)][f"{CONDITIONAL}_map"][steps // 2, i, j] for i, j in columns]
                for p in shown
            ]
            found.figures["maps-prompts"] = (
                f"The same heads under {len(shown)} prompts with the noise of seed {seed}, vision tokens alone, at "
                f"step {work.measured_steps[steps // 2]}.",
                map_panels(
                    panels, [f"prompt {p}" for p in shown],
                    [f"layer {work.layers[i]} head {heads[j]}" for i, j in columns], MapLines.of(self.sizes(work), 0),
                ),
            )  # fmt: skip


def _row(one: Compared) -> list[object]:
    """Cells of a comparison, with intervals."""
    cells: list[object] = [with_ends(*one.overall(name)) for name in ("same", "layer_others", "others")]
    return [*cells, with_ends(*one.overall("same", "layer_others")), with_ends(*one.overall("recognised"))]


class _Shares:
    """Diagonal, stripes, own frame and text of every layer and head.

    Args:
        study: whose results they are.
        results: of all units.
        work: the workbench.
    """

    def __init__(self, study: Structure, results: Results, work: Workbench) -> None:
        self.results, self.work, self.heads = results, work, study.heads(work)
        frames, side = study.sizes(work).frames, study.sizes(work)
        whole = frames * side.cells * side.finer
        #: What uniform attention would give.
        self.uniform = {"diagonal": 1 / whole, "stripes": (frames - 1) / whole, "own_frame": 1 / frames}

    @cached_property
    def means(self) -> dict[str, NDArray]:
        """Means over steps and pairs of the conditional pass, (Ly, h)."""
        return {name: self._by_pair(CONDITIONAL, name).mean(axis=0) for name in SHARES}

    def _by_pair(self, done: str, name: str) -> NDArray:
        """Means over steps, (P, Ly, h)."""
        return self.results.stack(_OWN, f"{done}_{name}").mean(axis=1)

    def add(self, found: Findings) -> None:
        """Adds sentence, tables, figures and values."""
        layers = self.work.layers
        found.values["uniform"] = self.uniform
        found.values["shares"] = {name: table.tolist() for name, table in self.means.items()}
        for name in ("diagonal", "stripes"):
            table = self.means[name]
            place = np.unravel_index(table.argmax(), table.shape)
            found.sentences.append(
                f"The strongest {name} (conditional pass): layer {layers[place[0]]} head {self.heads[place[1]]} with "
                f"{table[place]:.3g} of its attention among vision tokens; the median head has "
                f"{float(np.median(table)):.3g}, uniform attention {self.uniform[name]:.3g}."
            )
        drawn = [name for name in SHARES if name != "text" or self.means["text"].any()]
        for name in drawn:
            level = f" Uniform attention gives {self.uniform[name]:.3g}." if name in self.uniform else ""
            found.figures[name] = (
                f"{_TITLES[name].capitalize()}; conditional pass, means over prompts, seeds and steps.{level}",
                heat_map(
                    self.means[name], x_label="head", y_label="layer", x_ticks=self.heads, y_ticks=layers,
                    value_label=name.replace("_", " "),
                ),
            )  # fmt: skip
        found.tables["layers"] = self._layers()
        found.tables["heads"] = self._strongest()

    def _layers(self) -> Table:
        rows: list[list[object]] = []
        for done in self.work.passes:
            ends = {name: mean_interval(self._by_pair(done, name).mean(-1), self.results.prompts) for name in SHARES}
            for i, layer in enumerate(self.work.layers):
                cells = [with_ends(float(mean[i]), float(low[i]), float(high[i])) for mean, low, high in ends.values()]
                rows.append([done, layer, *cells])
        rows.append(["uniform attention", "", *(f"{value:.3g}" for value in self.uniform.values()), ""])
        note = "; ".join(_TITLES.values()) + ". Means over heads, steps, prompts and seeds. "
        return Table(
            "Diagonal and stripes by layer", ("pass", "layer", "diagonal", "stripes", "own frame", "text"), rows,
            note + interval_note(self.results.prompts),
        )  # fmt: skip

    def _strongest(self, count: int = 16) -> Table:
        table = self.means["diagonal"] + self.means["stripes"]
        order: Sequence[int] = np.argsort(-table, axis=None)[:count].tolist()
        places = [np.unravel_index(index, table.shape) for index in order]
        rows = [
            [self.work.layers[i], self.heads[j], *(float(self.means[name][i, j]) for name in SHARES)] for i, j in places
        ]
        return Table(
            "Heads that look most at the same place", ("layer", "head", "diagonal", "stripes", "own frame", "text"),
            rows, "By diagonal and stripes together, conditional pass; all heads are in findings.json.",
        )  # fmt: skip
