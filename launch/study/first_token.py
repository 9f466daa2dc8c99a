"""`reblock study first-token`: one text token is all that the model reads of the caption.

Legend: P (prompt, seed) pairs, L text tokens among the keys, Ly layers.
"""

import contextlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from launch.sample.generate import Pixels
from launch.study.denoising import CONDITIONAL
from launch.study.distances import distances
from launch.study.figures import curves, heat_map
from launch.study.settings import StudySettings
from launch.study.statistics import interval_note, mean_interval, mean_text
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.text_tokens import NOTES, POOLED, OneTextToken, TextMass, caption_lengths, kept_token, text_site
from launch.study.workbench import Workbench

#: What stays of the caption.
KINDS = ("first", "last", "random", "none", "all")
#: What stays where one layer at a time is changed: `all` is a control of the whole model.
_BY_LAYER = KINDS[:-1]
_LABELS = {"first": "first alone", "last": "last alone", "random": "another alone", "none": "no text"}
_MODEL, _LAYER, _VIDEO, _MASS, _POOLED = "model", "layer", "video", "mass", "pooled"


class FirstToken(Study):
    """Options of the study of the first text token.

    Args:
        by_layer: also change one layer at a time.
        videos: draw whole videos, too.
    """

    name = "first-token"
    question = "How much of the caption does the model read from its first text token alone?"

    def __init__(self, *, by_layer: bool = True, videos: bool = True) -> None:
        self.by_layer, self.videos = by_layer, videos
        self._no_text: tuple[tuple[Workbench, int, int], Pixels] | None = None

    def check(self, work: Workbench) -> None:
        pass  # every family reads text, and both options are yes or no

    def scopes(self, work: StudySettings) -> dict[str, str]:
        """What is cut -> the end of the names of its units."""
        pooled = {"attention and pooled caption": f"-{_POOLED}"} if work.use.family in POOLED else {}
        return {"attention": ""} | pooled

    def variants(self, work: Workbench) -> list[str]:
        whole = [f"{kind}{end}" for end in self.scopes(work).values() for kind in KINDS]
        layers = [f"{_LAYER}-{layer:02d}" for layer in work.layers] if self.by_layer else []
        videos = [f"{_VIDEO}-{name}" for name in whole] if self.videos else []
        return [_MASS, *(f"{_MODEL}-{name}" for name in whole), *layers, *videos]

    def effort(self, settings: StudySettings) -> Effort:
        whole = len(self.scopes(settings)) * len(KINDS)
        layers = len(settings.layers) * len(_BY_LAYER) if self.by_layer else 0
        # Videos are compared with one without text, too.
        return Effort(videos=(whole + 1) if self.videos else 0, repeats=1 + whole + layers)

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        what, _, which = unit.variant.partition("-")
        if what == _MASS:
            return Measured(self._mass(unit, work))
        if what == _LAYER:
            return Measured(self._one_layer(unit, work, int(which)))
        kind, _, pooled = which.partition("-")
        if what == _VIDEO:
            return self._video(unit, work, kind, pooled=bool(pooled))
        token = self._token(unit, work, kind)
        with token.pooled() if pooled else contextlib.nullcontext():
            errors = self._errors(unit, work, token, work.layers)
        return Measured({name: np.array(error) for name, error in errors.items()})

    def _token(self, unit: Unit, work: Workbench, kind: str) -> OneTextToken:
        seed, lengths = f"{unit.prompt}-{unit.seed}", caption_lengths(work, unit.prompt, unit.seed)
        tokens = {name: kept_token(kind, length, seed) for name, length in lengths.items()}
        return OneTextToken(work.denoiser, tokens)

    def _errors(self, unit: Unit, work: Workbench, token: OneTextToken, layers: list[int]) -> dict[str, float]:
        functions = dict.fromkeys(layers, token.attend)
        return work.mean_errors(unit.prompt, unit.seed, functions, site=text_site(work.denoiser))

    def _one_layer(self, unit: Unit, work: Workbench, layer: int) -> dict[str, NDArray]:
        """`KIND_PASS`: D with the kind in this layer's attention."""
        found: dict[str, NDArray] = {}
        for kind in _BY_LAYER:
            errors = self._errors(unit, work, self._token(unit, work, kind), [layer])
            found |= {f"{kind}_{name}": np.array(error) for name, error in errors.items()}
        return found

    def _mass(self, unit: Unit, work: Workbench) -> dict[str, NDArray]:
        """Of each pass: mass on each text key (Ly, L) of the dense calls, and the caption's tokens."""
        mass = TextMass(work.denoiser)
        functions = dict.fromkeys(work.layers, mass.attend)
        lengths = caption_lengths(work, unit.prompt, unit.seed)
        for call in work.dense(unit.prompt, unit.seed).calls:
            work.again(call, functions, site=text_site(work.denoiser))
        found = {name: np.stack([mass.mean(name, layer) for layer in work.layers]) for name in lengths}
        return found | {f"tokens_{name}": np.array(length) for name, length in lengths.items()}

    def _video(self, unit: Unit, work: Workbench, kind: str, *, pooled: bool) -> Measured:
        """A whole video, with distances to the dense one and to the one without text."""
        no_text = self._without_text(unit, work)
        video = self._draw(unit, work, kind, pooled=pooled)
        dense = distances(video, work.dense(unit.prompt, unit.seed).pixels)
        arrays = dense | {f"{name}_no_text": value for name, value in distances(video, no_text).items()}
        return Measured({name: np.array(value) for name, value in arrays.items()}, video)

    def _draw(self, unit: Unit, work: Workbench, kind: str, *, pooled: bool) -> Pixels:
        token = self._token(unit, work, kind)
        functions = dict.fromkeys(work.layers, token.attend)
        with token.pooled() if pooled else contextlib.nullcontext():
            return work.draw(unit.prompt, unit.seed, functions, site=text_site(work.denoiser))

    def _without_text(self, unit: Unit, work: Workbench) -> Pixels:
        """The video of a unit's noise without text in attention and, where there is one, in the pooled caption."""
        key = work, unit.prompt, unit.seed
        if self._no_text is None or self._no_text[0] != key:
            pooled = len(self.scopes(work)) > 1
            self._no_text = key, self._draw(unit, work, "none", pooled=pooled)
        return self._no_text[1]

    # -- what is found -----------------------------------------------------------------------------------------------

    def findings(self, results: Results, work: Workbench) -> Findings:
        found = Findings()
        self._whole(found, results, work)
        self._masses(found, results, work)
        if self.by_layer:
            self._layers(found, results, work)
        if self.videos:
            self._videos(found, results, work)
        found.limits += _limits(work)
        return found

    def _whole(self, found: Findings, results: Results, work: Workbench) -> None:
        prompts, rows = results.prompts, []
        for scope, end in self.scopes(work).items():
            changes = {kind: results.stack(f"{_MODEL}-{kind}{end}", CONDITIONAL) for kind in KINDS}
            said = {kind: mean_text(values, prompts) for kind, values in changes.items()}
            exact = all(results.stack(f"{_MODEL}-all{end}", name).max() == 0 for name in work.passes)
            difference = changes["random"] - changes["first"]
            _, low, high = mean_interval(difference, prompts)
            doubt = "" if low > 0 or high < 0 else ", no difference that can be told from noise"
            found.sentences.append(
                f"In {scope}, conditional pass: with the first text token alone D = {said['first']}, with the last "
                f"alone {said['last']}, with another alone {said['random']}, without text {said['none']}. "
                f"Another minus the first: {mean_text(difference, prompts)}{doubt}. Control: with all tokens, "
                + ("no bit of any prediction changes." if exact else "predictions change: the comparison is unsound.")
            )
            for name in work.passes:
                for kind in KINDS:
                    ends = mean_interval(results.stack(f"{_MODEL}-{kind}{end}", name), prompts)
                    rows.append([scope, kind, name, *map(float, ends)])
        found.values["whole"] = [dict(zip(("scope", "kept", "pass", "D"), row[:4], strict=True)) for row in rows]
        found.tables["whole"] = Table(
            "Text tokens that stay, in all studied layers", ("cut in", "kept", "pass", "D", "low", "high"), rows,
            "D = |v' − v_0|² / |v_0|² of the prediction on the inputs of the dense trajectory. `random` is one token "
            "that is neither the first nor the last, drawn for each prompt and seed; `all` is the control. "
            + interval_note(prompts),
        )  # fmt: skip

    def _layers(self, found: Findings, results: Results, work: Workbench) -> None:
        lines, rows, prompts = {}, [], results.prompts
        for name in self._passes_with_text(results, work):
            for kind in _BY_LAYER:
                table = np.stack(
                    [results.stack(f"{_LAYER}-{layer:02d}", f"{kind}_{name}") for layer in work.layers], axis=1
                )
                mean, low, high = mean_interval(table, prompts)
                rows += [
                    [layer, kind, name, float(mean[i]), float(low[i]), float(high[i])]
                    for i, layer in enumerate(work.layers)
                ]
                if name == CONDITIONAL:
                    lines[_LABELS[kind]] = (work.layers, mean, (low, high))
        found.tables["layers"] = Table(
            "One layer's attention at a time",
            ("layer", "kept", "pass", "D", "low", "high"),
            rows,
            interval_note(prompts),
        )
        found.figures["layers"] = (
            "Change of the prediction, conditional pass, where one layer's attention reads one text token or none.",
            curves(lines, x_label="layer", y_label="D", log=True),
        )

    def _masses(self, found: Findings, results: Results, work: Workbench) -> None:
        for name in work.passes:
            if name not in self._passes_with_text(results, work):
                found.limits.append(f"The {name} pass has no text tokens: it is in the first table only.")
                continue
            masses = [results[Unit(*pair, _MASS)][name] for pair in results.pairs]
            self._mass_of_pass(found, results, work, name, masses)

    def _passes_with_text(self, results: Results, work: Workbench) -> list[str]:
        return [
            name for name in work.passes
            if all(results[Unit(*pair, _MASS)][name].shape[1] > 0 for pair in results.pairs)
        ]  # fmt: skip

    def _mass_of_pass(
        self, found: Findings, results: Results, work: Workbench, name: str, masses: list[NDArray]
    ) -> None:
        """Figures and table of the mass on text keys, one array (Ly, L) for each pair."""
        prompts = results.prompts
        counts = [int(results[Unit(*pair, _MASS)][f"tokens_{name}"]) for pair in results.pairs]
        parts = {
            "text": np.stack([mass.sum(axis=1) for mass in masses]),
            "first": np.stack([mass[:, 0] / mass.sum(axis=1) for mass in masses]),
            "last": np.stack([m[:, n - 1] / m.sum(axis=1) for m, n in zip(masses, counts, strict=True)]),
            "padding": np.stack([m[:, n:].sum(axis=1) / m.sum(axis=1) for m, n in zip(masses, counts, strict=True)]),
        }
        ends = {part: mean_interval(values, prompts) for part, values in parts.items()}
        uniform = float(np.mean([1 / mass.shape[1] for mass in masses]))
        top = int(ends["first"][0].argmax())
        said = mean_text(parts["first"][:, top], prompts)
        found.sentences.append(
            f"{name.capitalize()} pass: the first text token gets the largest share of the attention on text in layer "
            f"{work.layers[top]}: {said}, beside an equal share of {uniform:.3g}. The mean over layers is "
            f"{float(ends['first'][0].mean()):.3g}."
        )
        columns = ("layer", "mass on text", "share of the first", "low", "high", "equal share", "share of the last",
                   "share of padding")  # fmt: skip
        rows = [
            [
                layer, float(ends["text"][0][i]), *(float(end[i]) for end in ends["first"]), uniform,
                float(ends["last"][0][i]), float(ends["padding"][0][i]),
            ]
            for i, layer in enumerate(work.layers)
        ]  # fmt: skip
        found.values[f"mass_{name}"] = {str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows}
        found.tables[f"mass-{name}"] = Table(
            f"Attention of vision queries on text, {name} pass", columns, rows,
            "Mass: mean over heads and vision queries. Shares are of the mass on text, with padding where it is a key. "
            + interval_note(prompts),
        )  # fmt: skip
        shown, names = by_position(masses, counts)
        found.figures[f"mass-{name}"] = (
            f"Attention mass of vision queries on each text key, {name} pass, mean over heads, queries and the prompts "
            "that have the position; `pad`: on one key of padding, where padding is read.",
            heat_map(
                np.log10(shown + 1e-12), x_label="position of the text token", y_label="layer", x_ticks=names,
                y_ticks=work.layers, value_label="log10 of the mass", title=f"{name} pass",
            ),
        )  # fmt: skip
        flat = np.full(len(work.layers), uniform)
        found.figures[f"first-{name}"] = (
            f"Share of the first and the last text token in the attention on text, {name} pass, beside an equal share.",
            curves(
                {
                    "first": (work.layers, ends["first"][0], ends["first"][1:]),
                    "last": (work.layers, ends["last"][0], ends["last"][1:]),
                    "equal share": (work.layers, flat, None),
                },
                x_label="layer", y_label="share of the mass on text",
            ),
        )  # fmt: skip

    def _videos(self, found: Findings, results: Results, work: Workbench) -> None:
        rows, prompts = [], results.prompts
        names = [f"{name}{end}" for end in ("", "_no_text") for name in ("psnr", "ssim", "coarse")]
        for scope, end in self.scopes(work).items():
            psnr, no_text = (results.stack(f"{_VIDEO}-first{end}", name) for name in ("psnr", "psnr_no_text"))
            found.sentences.append(
                f"Whole videos, cut in {scope}: with the first text token alone the PSNR is "
                f"{mean_text(psnr, prompts)} dB to the dense video and {mean_text(no_text, prompts)} dB to the "
                f"video without text; the difference is "
                f"{mean_text(psnr - no_text, prompts)} dB."
            )
            for kind in KINDS:
                means = [mean_text(results.stack(f"{_VIDEO}-{kind}{end}", name), prompts) for name in names]
                rows.append([scope, kind, *means])
        found.tables["videos"] = Table(
            "Whole videos, against the dense one and the one without text",
            ("cut in", "kept", "PSNR to dense (dB)", "SSIM", "coarse", "PSNR to no text (dB)", "SSIM", "coarse"), rows,
            "100 dB stands for no difference: `all` must be the dense video. " + interval_note(prompts),
        )  # fmt: skip


def by_position(masses: Sequence[NDArray], counts: Sequence[int]) -> tuple[NDArray, list[str]]:
    """Mass by position of a caption's token, mean over pairs, and at last on one key of padding, if any is read.

    Args:
        masses: (Ly, L) of each pair.
        counts: tokens of each pair's caption; the keys behind them are padding.

    Returns:
        (Ly, columns), and the columns' names.
    """
    pairs = list(zip(masses, counts, strict=True))
    columns = [np.mean([m[:, i] for m, n in pairs if i < n], axis=0) for i in range(max(counts))]
    names = [str(i) for i in range(max(counts))]
    padding = [m[:, n:].mean(axis=1) for m, n in pairs if m.shape[1] > n]
    if padding:
        columns.append(np.mean(padding, axis=0))
        names.append("pad")
    return np.stack(columns, axis=1), names


def _limits(work: Workbench) -> list[str]:
    """What the study cannot show, of the base's family."""
    found = [
        "A text encoder mixes tokens: what the first token says comes from the whole caption, unless the encoder is "
        "causal. The study tells where the model reads, not what the words at that place mean.",
        "Attention mass is not use: a token whose value is small gets mass without effect. D tells the effect.",
    ]
    return [*found, NOTES[work.use.family.name]]
