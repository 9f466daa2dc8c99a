"""`reblock study masking`: oracle masking of the smallest attention weights.

Legend: P (prompt, seed) pairs, C calls of one pass, R ratios, Ly layers, h heads.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from launch.study.denoising import CONDITIONAL
from launch.study.distances import distances
from launch.study.figures import curves, heat_map
from launch.study.recorders import BottomMask
from launch.study.settings import StudySettings
from launch.study.statistics import interval_note, mean_interval, mean_text, with_ends
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench

_ALL, _EXCEPT, _VIDEO = "all", "except", "video"


class Masking(Study):
    """Options of the study of masking.

    Args:
        ratios: shares of each head's smallest weights that are removed.
        layer_ratio: share at which layers and heads are masked one at a time.
        video_ratios: shares at which whole videos are drawn, with all studied layers masked.
        spare: layers that stay dense while all other studied ones are masked; none leaves this out.
        by_head: mask every studied head by itself, too.
        renormalise: rows sum to one again after masking, as in a sparse kernel.
    """

    name = "masking"
    question = "What does the prediction lose when the smallest attention weights are removed?"

    def __init__(
        self,
        *,
        ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
        layer_ratio: float = 0.7,
        video_ratios: tuple[float, ...] = (0.5,),
        spare: tuple[int, ...] = (),
        by_head: bool = True,
        renormalise: bool = True,
    ) -> None:
        self.ratios, self.layer_ratio, self.video_ratios = tuple(ratios), layer_ratio, tuple(video_ratios)
        self.spare, self.by_head, self.renormalise = tuple(spare), by_head, renormalise

    def check(self, work: Workbench) -> None:
        wrong = [r for r in (*self.ratios, self.layer_ratio, *self.video_ratios) if not 0.0 < r < 1.0]
        if wrong or not self.ratios or list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError(
                f"got ratios {list(self.ratios)}, layer_ratio {self.layer_ratio:g}, video_ratios "
                f"{list(self.video_ratios)}, expected shares above 0 and below 1, those of ratios rising."
            )
        unknown = sorted(set(self.spare) - set(work.layers))
        if unknown:
            raise ValueError(f"got spare {unknown}, expected some of the studied layers {work.layers}.")

    def variants(self, work: Workbench) -> list[str]:
        scopes = [_ALL, *([_EXCEPT] if self.spare else []), *(f"layer-{layer:02d}" for layer in work.layers)]
        return scopes + [f"{_VIDEO}-{ratio:g}" for ratio in self.video_ratios]

    def effort(self, settings: StudySettings) -> Effort:
        heads = len(settings.studied_heads) if self.by_head else 0
        scans = len(self.ratios) * (1 + bool(self.spare))
        return Effort(videos=len(self.video_ratios), repeats=scans + len(settings.layers) * (1 + heads))

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        kind, _, which = unit.variant.partition("-")
        if kind == _VIDEO:
            mask = BottomMask(float(which), renormalise=self.renormalise)
            video = work.draw(unit.prompt, unit.seed, dict.fromkeys(work.layers, mask.attend))
            arrays = distances(video, work.dense(unit.prompt, unit.seed).pixels) | mask.means()
            return Measured({name: np.array(value) for name, value in arrays.items()}, video)
        if kind == "layer":
            return Measured(self._one_layer(unit, work, int(which)))
        layers = [layer for layer in work.layers if kind == _ALL or layer not in self.spare]
        return Measured(self._scan(unit, work, layers, self.ratios))

    def _one_layer(self, unit: Unit, work: Workbench, layer: int) -> dict[str, NDArray]:
        found = self._scan(unit, work, [layer], (self.layer_ratio,))
        if self.by_head:
            heads = work.studied_heads
            scans = [self._scan(unit, work, [layer], (self.layer_ratio,), heads=[head]) for head in heads]
            found |= {f"head_{name}": np.concatenate([scan[name] for scan in scans]) for name in scans[0]}
        return found

    def _scan(
        self, unit: Unit, work: Workbench, layers: Sequence[int], ratios: Sequence[float],
        heads: Sequence[int] | None = None,
    ) -> dict[str, NDArray]:  # fmt: skip
        """D of each pass, realised ratio and dropped mass, each (ratios,): means over the kept calls."""
        rows = []
        for ratio in ratios:
            mask = BottomMask(ratio, heads=heads, renormalise=self.renormalise)
            errors = work.mean_errors(unit.prompt, unit.seed, dict.fromkeys(layers, mask.attend))
            rows.append(errors | mask.means())
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def findings(self, results: Results, work: Workbench) -> Findings:
        found, prompts = Findings(), results.prompts
        scopes = {"all studied layers": _ALL} | ({"all but the spared": _EXCEPT} if self.spare else {})
        lines, rows = {}, []
        for title, variant in scopes.items():
            for name in work.passes:
                mean, low, high = mean_interval(results.stack(variant, name), prompts)
                lines[f"{title}, {name}"] = (self.ratios, mean, (low, high))
                dropped = results.stack(variant, "dropped").mean(axis=0)
                rows += [
                    [title, name, ratio, float(m), float(a), float(b), float(d)]
                    for ratio, m, a, b, d in zip(self.ratios, mean, low, high, dropped, strict=True)
                ]
        note = "D = |v_r − v_0|² / |v_0|² of the prediction on the inputs of the dense trajectory. " + interval_note(
            prompts
        )
        found.tables["ratios"] = Table(
            "Whole model", ("scope", "pass", "ratio", "D", "low", "high", "dropped mass"), rows, note
        )
        found.figures["ratios"] = (
            "Change of the prediction by the share of weights removed in every studied layer.",
            curves(lines, x_label="share of weights removed", y_label="D", log=True),
        )
        self._layers(found, results, work)
        self._videos(found, results)
        found.limits += [
            "A model that ignores its attention bears any masking: D near 0 is no sign of health by itself.",
            "Masks come from the dense pass of the same input (an oracle); a sparse kernel has to guess them.",
            "D at a step leaves out how errors add up over steps; the videos show that.",
        ]
        return found

    def _layers(self, found: Findings, results: Results, work: Workbench) -> None:
        prompts = results.prompts
        table = np.stack([results.stack(f"layer-{layer:02d}", CONDITIONAL)[:, 0] for layer in work.layers], axis=1)
        mean, low, high = mean_interval(table, prompts)
        mass = [float(results.stack(f"layer-{layer:02d}", "dropped").mean()) for layer in work.layers]
        order = sorted(range(len(work.layers)), key=lambda place: -mean[place])
        found.sentences.append(
            f"With {self.layer_ratio:.0%} of one layer's weights removed, layer {work.layers[order[0]]} changes the "
            f"prediction most: D = {with_ends(mean[order[0]], low[order[0]], high[order[0]])}; the median layer's is "
            f"{float(np.median(mean)):.3g}."
        )
        found.values["sensitivity"] = {
            str(layer): {"D": float(mean[i]), "low": float(low[i]), "high": float(high[i]), "dropped": mass[i]}
            for i, layer in enumerate(work.layers)
        }
        found.tables["layers"] = Table(
            f"One layer at a time, {self.layer_ratio:.0%} removed, conditional pass",
            ("layer", "D", "low", "high", "dropped mass"),
            [[work.layers[i], float(mean[i]), float(low[i]), float(high[i]), mass[i]] for i in order],
            "Most sensitive first. Equal ratios drop very different mass. " + interval_note(prompts),
        )
        found.figures["layers"] = (
            f"Sensitivity of each layer at {self.layer_ratio:.0%}.",
            curves({"D": (work.layers, mean, (low, high))}, x_label="layer", y_label="D", log=True),
        )
        if self.by_head:
            heads = work.studied_heads
            matrix = np.stack(
                [results.stack(f"layer-{layer:02d}", f"head_{CONDITIONAL}").mean(axis=0) for layer in work.layers]
            )
            found.values["by_head"] = {
                str(layer): dict(zip(map(str, heads), matrix[i].tolist(), strict=True))
                for i, layer in enumerate(work.layers)
            }
            found.figures["heads"] = (
                f"One head at a time, {self.layer_ratio:.0%} of its weights removed: log10 of D.",
                heat_map(
                    np.log10(matrix + 1e-12), x_label="head", y_label="layer", x_ticks=heads, y_ticks=work.layers,
                    value_label="log10 D",
                ),
            )  # fmt: skip

    def _videos(self, found: Findings, results: Results) -> None:
        rows = []
        for ratio in self.video_ratios:
            variant = f"{_VIDEO}-{ratio:g}"
            row: list[object] = [ratio]
            for name in ("psnr", "ssim", "coarse", "colour", "realised", "dropped"):
                row.append(mean_text(results.stack(variant, name), results.prompts))
            rows.append(row)
        if rows:
            found.tables["videos"] = Table(
                "Whole videos, all studied layers masked, against the dense ones",
                ("ratio", "PSNR (dB)", "SSIM", "coarse", "colour", "realised ratio", "dropped mass"), rows,
                interval_note(results.prompts),
            )  # fmt: skip
