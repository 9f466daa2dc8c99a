"""`reblock study temperature`: the softmax of one layer at a time made sharper or flatter.

Legend: T temperatures, h heads, Ly layers.
"""

import math
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from launch.study.denoising import Denoiser
from launch.study.distances import distances
from launch.study.figures import heat_map
from launch.study.recorders import row_by_row
from launch.study.settings import StudySettings
from launch.study.statistics import interval_note, mean_interval, mean_text, with_ends
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench
from trainer.attention import row_statistics, uniform_attention
from trainer.attention.interventions import temperature
from trainer.models.layout import AttentionCall, AttentionFunction

_LAYER, _VIDEO, _CONTROL = "layer", "video", "control"

#: The limit of a high temperature: every query attends to all keys alike.
uniform: AttentionFunction = row_by_row(lambda q, k, v, row: uniform_attention(v))


def normalised_entropy(q: Tensor, k: Tensor, value: float) -> Tensor:
    """Mean over queries of the entropy of softmax(Q K^T / (T sqrt(d))), divided by log M.

    Args:
        q: (B, h, N, d).
        k: (B, h, M, d), two keys or more.
        value: T.

    Returns:
        (B, h) float64, 1 for uniform rows.
    """
    entropy = row_statistics(q.float() / value, k.float()).entropy
    return entropy.double().mean(dim=-1) / math.log(k.shape[2])


class Tempered:
    """Attention at a temperature, with the entropy of its rows.

    Args:
        value: T.
        denoiser: tells the pass of each row.
    """

    def __init__(self, value: float, denoiser: Denoiser) -> None:
        self.value, self.denoiser = value, denoiser
        self._change = temperature(value)
        #: Pass -> of every row seen, the mean over queries of entropy / log(number of keys), (h,).
        self.seen: dict[str, list[NDArray]] = defaultdict(list)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """The attention function. Padded text is neither query nor key of the entropy."""
        for row, name in enumerate(self.denoiser.passes):
            valid = call.layout.num_vision + call.layout.text_lengths[row]
            own_q, own_k = (x[row : row + 1, :, :valid] for x in (q, k))
            self.seen[name].append(normalised_entropy(own_q, own_k, self.value)[0].cpu().numpy())
        return self._change(q, k, v, call)

    def entropy(self) -> dict[str, NDArray]:
        """Pass -> mean over rows and calls, (h,)."""
        return {name: np.mean(values, axis=0) for name, values in self.seen.items()}


class Temperature(Study):
    """Options of the study of temperature.

    Args:
        temperatures: T of softmax(Q K^T / (T sqrt(d))), one layer at a time; 1 must be among them, as the control.
        video_temperatures: T at which whole videos are drawn; none draws no videos.
        video_layers: layers of these videos, one at a time; None takes the first, middle and last of the studied ones.
    """

    name = "temperature"
    question = "How sensitive is the prediction to a sharper or flatter softmax in one layer?"

    def __init__(
        self,
        *,
        temperatures: tuple[float, ...] = (0.25, 0.5, 0.7, 1.0, 1.5, 2.0),
        video_temperatures: tuple[float, ...] = (0.5, 2.0),
        video_layers: tuple[int, ...] | None = None,
    ) -> None:
        self.temperatures, self.video_temperatures = tuple(temperatures), tuple(video_temperatures)
        self._video_layers = None if video_layers is None else tuple(video_layers)

    def check(self, work: Workbench) -> None:
        faults = []
        for name, given in (
            ("temperatures", self.temperatures),
            ("video_temperatures", self.video_temperatures),
        ):
            if list(given) != sorted(set(given)) or not all(0.0 < value < math.inf for value in given):
                faults.append(f"got {name} {list(given)}, expected rising positive numbers")
        if 1.0 not in self.temperatures or len(self.temperatures) < 2:
            faults.append(f"got temperatures {list(self.temperatures)}, expected 1, the control, and another")
        unknown = sorted(set(self._video_layers or ()) - set(work.layers))
        if unknown:
            faults.append(f"got video_layers {unknown}, expected some of the studied layers {work.layers}")
        if faults:
            raise ValueError("; ".join(faults) + ".")

    def video_layers(self, work: StudySettings) -> list[int]:
        """Layers whose temperature is changed in whole videos."""
        layers = work.layers
        if self._video_layers is not None:
            return sorted(set(self._video_layers))
        return sorted({layers[0], layers[len(layers) // 2], layers[-1]})

    def variants(self, work: Workbench) -> list[str]:
        scans = [f"{_LAYER}-{layer:02d}" for layer in work.layers]
        videos = [
            f"{_VIDEO}-{layer:02d}-{value:g}" for layer in self.video_layers(work) for value in self.video_temperatures
        ]
        return scans + ([_CONTROL, *videos] if videos else [])

    def effort(self, settings: StudySettings) -> Effort:
        videos = len(self.video_layers(settings)) * len(self.video_temperatures)
        return Effort(videos=videos + bool(videos), repeats=len(settings.layers) * (len(self.temperatures) + 1))

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        kind, *which = unit.variant.split("-", 2)
        if kind == _LAYER:
            return Measured(self._one_layer(unit, work, int(which[0])))
        functions = dict.fromkeys(work.layers, temperature(1.0))
        if kind == _VIDEO:
            functions = {int(which[0]): temperature(float(which[1]))}
        video = work.draw(unit.prompt, unit.seed, functions)
        found = distances(video, work.dense(unit.prompt, unit.seed).pixels)
        return Measured({name: np.array(value) for name, value in found.items()}, video)

    def _one_layer(self, unit: Unit, work: Workbench, layer: int) -> dict[str, NDArray]:
        """Of each pass: D at every temperature and of uniform attention, (T + 1,), and normalised entropies, (T, h)."""
        errors, entropies = [], []
        for value in self.temperatures:
            tempered = Tempered(value, work.denoiser)
            errors.append(work.mean_errors(unit.prompt, unit.seed, {layer: tempered.attend}))
            entropies.append(tempered.entropy())
        errors.append(work.mean_errors(unit.prompt, unit.seed, {layer: uniform}))
        found = {name: np.array([row[name] for row in errors]) for name in errors[0]}
        return found | {f"entropy_{name}": np.stack([row[name] for row in entropies]) for name in entropies[0]}

    # -- what is found -----------------------------------------------------------------------------------------------

    def findings(self, results: Results, work: Workbench) -> Findings:
        found = Findings()
        for name in work.passes:
            table = np.stack([results.stack(f"{_LAYER}-{layer:02d}", name) for layer in work.layers], axis=1)
            entropy = np.stack(
                [results.stack(f"{_LAYER}-{layer:02d}", f"entropy_{name}") for layer in work.layers], axis=1
            )
            self._pass(found, work, name, table, entropy, results.prompts)
        self._videos(found, results, work)
        found.limits += [
            "T changes all heads of a layer together: a head that matters may hide among others.",
            "D at a step is on the inputs of the dense trajectory; it leaves out how errors add up over steps. The "
            "videos show that.",
            "A layer that bears uniform attention (the last column) does not use its attention map; sensitivity to T "
            "is then small whatever the map is.",
            "Equal steps of T change a sharp map and a flat one by different amounts: read D beside the entropies.",
        ]
        return found

    def _pass(
        self, found: Findings, work: Workbench, name: str, table: NDArray, entropy: NDArray, prompts: list[int]
    ) -> None:
        """What is found of one pass, from D (pairs, Ly, T + 1) and entropies (pairs, Ly, T, h)."""
        mean, low, high = mean_interval(table, prompts)
        control = self.temperatures.index(1.0)
        worst = float(table[:, :, control].max())
        found.sentences.append(
            f"Control, {name} pass: T = 1 "
            + (
                "changes no bit of any prediction."
                if worst == 0.0
                else f"changes the prediction by up to D = {worst:.3g}."
            )
        )
        for place, value in enumerate(self.temperatures):
            if value in (min(self.temperatures), max(self.temperatures)) and place != control:
                found.sentences.append(self._extremes(work, name, value, mean[:, place], low[:, place], high[:, place]))
        columns = [f"{value:g}" for value in self.temperatures] + ["uniform"]
        by_layer = entropy.mean(axis=(0, 3))  # (Ly, T)
        rows = [
            [
                layer, columns[j], float(mean[i, j]), float(low[i, j]), float(high[i, j]), float(by_layer[i, control]),
                float(by_layer[i, j]) if j < len(self.temperatures) else 1.0,
            ]
            for i, layer in enumerate(work.layers) for j in range(len(columns))
        ]  # fmt: skip
        found.tables[f"temperatures-{name}"] = Table(
            f"One layer at a time, {name} pass",
            ("layer", "T", "D", "low", "high", "entropy before", "entropy after"), rows,
            "D = |v_T − v_0|² / |v_0|² of the prediction on the inputs of the dense trajectory. Entropy: mean over "
            "queries and heads, divided by the logarithm of the number of keys; 1 is uniform. "
            + interval_note(prompts),
        )  # fmt: skip
        found.values[name] = {
            str(layer): {
                "D": dict(zip(columns, mean[i].tolist(), strict=True)),
                "entropy_by_head": dict(zip(columns, entropy[:, i].mean(axis=0).tolist(), strict=False)),
            }
            for i, layer in enumerate(work.layers)
        }
        shown = np.where(mean > 0, mean, np.nan)
        found.figures[f"temperatures-{name}"] = (
            f"Change of the prediction, {name} pass, by layer and temperature; white is no change at all, as at T = 1.",
            heat_map(
                np.log10(shown), x_label="temperature T of one layer", y_label="layer", x_ticks=columns,
                y_ticks=work.layers, value_label="log10 D", title=f"{name} pass",
            ),
        )  # fmt: skip
        found.figures[f"entropy-{name}"] = (
            f"Entropy of the attention rows, {name} pass, mean over queries and heads; 1 is uniform.",
            heat_map(
                by_layer, x_label="temperature T of one layer", y_label="layer", x_ticks=columns[:-1],
                y_ticks=work.layers, value_label="entropy / log(keys)", title=f"{name} pass", limits=(0.0, 1.0),
            ),
        )  # fmt: skip

    def _extremes(
        self, work: Workbench, name: str, value: float, mean: NDArray, low: NDArray, high: NDArray
    ) -> str:  # fmt: skip
        most, least = int(mean.argmax()), int(mean.argmin())
        said = [
            f"layer {work.layers[i]}, D = {with_ends(float(mean[i]), float(low[i]), float(high[i]))}"
            for i in (most, least)
        ]
        return f"At T = {value:g}, {name} pass, the most sensitive is {said[0]}; the least sensitive is {said[1]}."

    def _videos(self, found: Findings, results: Results, work: Workbench) -> None:
        names = ("psnr", "ssim", "coarse", "colour")
        drawn = [v for v in self.variants(work) if not v.startswith(_LAYER)]
        rows: list[list[object]] = []
        for variant in drawn:
            _, layer, value = variant.split("-", 2) if variant != _CONTROL else ("", "all studied", "1")
            row: list[object] = [layer, value]
            for name in names:
                row.append(mean_text(results.stack(variant, name), results.prompts))
            rows.append(row)
        if rows:
            found.tables["videos"] = Table(
                "Whole videos against the dense ones", ("layer", "T", "PSNR (dB)", "SSIM", "coarse", "colour"), rows,
                "The first row is the control and must be the dense video: 100 dB stands for no difference. "
                + interval_note(results.prompts),
            )  # fmt: skip
