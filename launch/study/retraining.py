"""`reblock study retraining`: masking, sinks and detail of a base and of retrained models, side by side.

Legend: T frames, H W pixels, R ratios, S kept steps, Ly layers, h heads, P (prompt, seed) pairs.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from data.base_folder import resolve_base
from data.files import temporaries, temporary_path, write_json
from launch.sample.generate import Pixels
from launch.sample.pipelines import check_pipeline
from launch.study.denoising import CONDITIONAL
from launch.study.distances import distances
from launch.study.figures import curves
from launch.study.recorders import BottomMask
from launch.study.settings import StudySettings
from launch.study.sink_records import record, with_sink
from launch.study.statistics import interval_note, mean_interval, mean_text
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench
from trainer.models.families import split_model_of
from trainer.models.load import load_transformer, read_config
from trainer.surgery import SurgeryConfig, apply_surgery, choose_blocks

BASE, RETRAINED = "base", "retrained"


#: x, y, and lower and upper ends of y, as `curves` takes them.
Line = tuple[ArrayLike, ArrayLike, tuple[ArrayLike, ArrayLike] | None]


def high_frequency_share(video: Pixels) -> float:
    """Share of a video's spatial energy beyond half of the Nyquist frequency: fine detail.

    |FFT|^2 of each frame's luminance, without its mean, over the frequencies (y, x) whose radius is above 1/4 cycle a
    pixel, divided by that over all.

    Args:
        video: (T, H, W, 3) uint8.
    """
    luminance = video.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255  # (T, H, W)
    energy = np.abs(np.fft.fft2(luminance - luminance.mean(axis=(1, 2), keepdims=True))) ** 2
    y, x = (np.fft.fftfreq(size) for size in luminance.shape[1:])
    fine = np.hypot(y[:, None], x[None, :]) > 0.25
    return float(energy[:, fine].sum() / max(energy.sum(), np.finfo(float).tiny))


def write_untrained(base: Path, out: Path, last: int, dtype: torch.dtype) -> Path:
    """Writes a pipeline folder whose last blocks are re-initialised and not trained; one that exists is kept."""
    if not (out / "reblock.json").is_file():
        for leftover in temporaries(out.parent, out.name):
            shutil.rmtree(leftover)
        beside = temporary_path(out)
        shutil.copytree(base, beside, ignore=shutil.ignore_patterns("transformer", "planted.json"))
        model = load_transformer(str(base), dtype=dtype)
        split_model = split_model_of(model)
        blocks = choose_blocks(split_model.num_blocks, last=last)
        apply_surgery(split_model, blocks, SurgeryConfig(last=last))
        model.save_pretrained(beside / "transformer", safe_serialization=True)
        write_json(beside / "reblock.json", {"blocks": list(blocks), "base": str(base), "weights": "untrained"})
        os.replace(beside, out)
    return out


class Retraining(Study):
    """Options of the study of what retraining changes.

    Args:
        retrained: pipeline folder written by `reblock export`; without it, the base with its last quarter of blocks
            re-initialised and not trained stands in.
        controls: name -> pipeline folder of further models, such as sham and fine-tuned ones.
        ratios: shares of each head's smallest weights that are removed from all studied layers.
        layer_ratio: share that is removed from one layer at a time.
        eps: weight above which attention is heavy, for sinks.
    """

    name = "retraining"
    question = "What does retraining change: sinks, what masking costs, detail?"

    def __init__(
        self,
        *,
        retrained: str | None = None,
        controls: dict[str, str] | None = None,
        ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
        layer_ratio: float = 0.7,
        eps: float = 0.3,
    ) -> None:
        self.retrained, self.controls = retrained, dict(controls or {})
        self.ratios, self.layer_ratio, self.eps = tuple(ratios), layer_ratio, eps
        self._benches: dict[str, Workbench] = {}

    @property
    def names(self) -> list[str]:
        """The models, the base first."""
        return [BASE, RETRAINED, *self.controls]

    def check(self, work: Workbench) -> None:
        if not all(0.0 < ratio < 1.0 for ratio in (*self.ratios, self.layer_ratio, self.eps)) or not self.ratios:
            raise ValueError(
                f"got ratios {list(self.ratios)}, layer_ratio {self.layer_ratio:g}, eps {self.eps:g}, expected shares "
                "above 0 and below 1."
            )
        wrong = sorted(name for name in self.controls if name in (BASE, RETRAINED) or not name.isidentifier())
        if wrong:
            raise ValueError(f"got controls named {wrong}, expected words other than {BASE} and {RETRAINED}.")
        for name in (self.retrained, *self.controls.values()):
            if name is not None:
                folder = resolve_base(name)
                check_pipeline(folder)
                own, other = work.transformer_config, read_config(str(folder))
                odd = sorted(
                    key for key in own.keys() | other.keys() if own.get(key) != other.get(key) and key[0] != "_"
                )
                if odd:
                    raise ValueError(f"{folder} is no retrained {work.base}: their configs differ in {', '.join(odd)}.")

    def variants(self, work: Workbench) -> list[str]:
        return self.names

    def effort(self, settings: StudySettings) -> Effort:
        models = 1 + 1 + len(self.controls)
        scans = models * (len(self.ratios) + len(settings.layers))
        return Effort(videos=models - 1, repeats=models, conditional_repeats=scans)

    def _bench(self, name: str, work: Workbench) -> Workbench:
        """The workbench of a model; one is kept at a time, since one model fits into memory."""
        if name == BASE:
            return work
        if name not in self._benches:
            folder = self.controls.get(name, self.retrained)
            if folder is None:
                last = max(1, work.facts.num_blocks // 4)
                folder = str(
                    write_untrained(work.base, work.config.out / "untrained", last, getattr(torch, work.config.dtype))
                )
            self._benches = {name: Workbench(work.config, folder)}
        return self._benches[name]

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        bench, prompt, seed = self._bench(unit.variant, work), unit.prompt, unit.seed
        video = bench.dense(prompt, seed).pixels
        arrays: dict[str, NDArray] = dict(record(bench, prompt, seed, (self.eps,)))
        arrays["fine"] = np.array(high_frequency_share(video))
        arrays["all"] = np.array([self._change(bench, prompt, seed, bench.layers, ratio) for ratio in self.ratios])
        arrays["layers"] = np.array(
            [self._change(bench, prompt, seed, [layer], self.layer_ratio) for layer in bench.layers]
        )
        if unit.variant != BASE:
            reference = work.dense(prompt, seed).pixels
            arrays |= {name: np.array(value) for name, value in distances(video, reference).items()}
        return Measured(arrays, None if unit.variant == BASE else video)

    @staticmethod
    def _change(bench: Workbench, prompt: int, seed: int, layers: list[int], ratio: float) -> float:
        """D of the conditional pass with the layers masked, mean over the measured steps."""
        functions = dict.fromkeys(layers, BottomMask(ratio).attend)
        calls = bench.conditional_calls(prompt, seed)
        return float(np.mean([bench.relative_errors(call, functions)[CONDITIONAL] for call in calls]))

    def findings(self, results: Results, work: Workbench) -> Findings:
        found, prompts = Findings(), results.prompts
        rows: list[list[str]] = []
        lines: dict[str, Line] = {}
        layer_lines: dict[str, Line] = {}
        for name in self.names:
            figures = self._figures(results, name)
            rows.append([name, *(mean_text(values, prompts) for values in figures.values())])
            for key, x, into in (("all", self.ratios, lines), ("layers", work.layers, layer_lines)):
                mean, low, high = mean_interval(results.stack(name, key), prompts)
                into[name] = (x, mean, (low, high))
        columns = list(self._figures(results, BASE))
        found.tables["models"] = Table(
            "Figures of every model", ("model", *columns), rows,
            "Sink heads: means over prompts and steps of the number of heads with a sink. D: relative change of the "
            f"prediction of the model's own inputs. {interval_note(prompts)}",
        )  # fmt: skip
        found.figures["all"] = (
            "Change of the prediction by the share of weights removed in all studied layers.",
            curves(lines, x_label="share of weights removed", y_label="D", log=True),
        )
        found.figures["layers"] = (
            f"Change of the prediction with {self.layer_ratio:.0%} of one layer's weights removed.",
            curves(layer_lines, x_label="layer", y_label="D", log=True),
        )
        self._differences(found, results, columns)
        found.values["models"] = {
            name: {key: float(np.mean(v)) for key, v in self._figures(results, name).items()} for name in self.names
        }
        if self.retrained is None:
            found.sentences.append(
                "No retrained model was given: the one called retrained is the base with its last blocks "
                "re-initialised, not trained. It shows how the page reads, and is the control `untrained`."
            )
        found.limits += [
            "Every model is measured on its own dense trajectories. A worse model bears more masking: read D beside "
            "the videos and beside the loss that `reblock report` has.",
            "Fewer sinks are no gain by themselves; what a cure costs is in the rows on detail and in the videos.",
            "Prompts share their noise by seed; intervals are over prompts.",
        ]
        return found

    def _figures(self, results: Results, name: str) -> Mapping[str, NDArray]:
        """Figures of a model over pairs, each (P,)."""
        fraction = results.stack(name, f"fraction_{CONDITIONAL}")  # (P, S, Ly, h, 1)
        ratio = results.stack(name, f"stream_largest_{CONDITIONAL}") / results.stack(
            name, f"stream_median_{CONDITIONAL}"
        )
        layers = results.stack(name, "layers")
        return {
            "sink heads": with_sink(fraction[..., 0]).sum(axis=(2, 3)).mean(axis=1),
            f"D at {self.ratios[len(self.ratios) // 2]:.0%}": results.stack(name, "all")[:, len(self.ratios) // 2],
            "D of the most sensitive layer": layers.max(axis=1),
            "high-frequency share": results.stack(name, "fine"),
            "largest activation over median": ratio.max(axis=2).mean(axis=1),
        }

    def _differences(self, found: Findings, results: Results, columns: list[str]) -> None:
        """Paired differences from the base, in a table and a sentence for the retrained model."""
        prompts, base, rows = results.prompts, self._figures(results, BASE), []
        for name in self.names[1:]:
            figures = self._figures(results, name)
            cells = [mean_text(figures[key] - base[key], prompts) for key in columns]
            rows.append([name, *cells, mean_text(results.stack(name, "psnr"), prompts)])
            if name == RETRAINED:
                found.sentences.append(
                    f"Against the base, the retrained model has {cells[0]} more heads with a sink; the share of fine "
                    f"detail in its videos differs by {cells[3]}."
                )
        found.tables["differences"] = Table(
            "Differences from the base, the same prompts and noise", ("model", *columns, "PSNR to the base (dB)"), rows,
            interval_note(prompts),
        )  # fmt: skip
