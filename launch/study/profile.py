"""`reblock study profile`: what each layer and head bears to be masked, as a file, and videos drawn by that file.

Legend: h heads, R ratios, S measured steps, Ly layers.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from launch.study.denoising import CONDITIONAL
from launch.study.distances import distances
from launch.study.figures import heat_map
from launch.study.profile_file import AttentionProfile
from launch.study.recorders import BottomMask
from launch.study.settings import StudySettings
from launch.study.sink_records import check_eps, record, with_sink
from launch.study.statistics import interval_note, mean_interval, mean_text
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench

_SINKS, _STEPS, _PROFILE, _UNIFORM = "sinks", "steps", "by-profile", "uniform"


class Profile(Study):
    """Options of the study of what can be masked.

    Args:
        ratios: shares that are tried on each head alone, rising.
        tolerance: D, the relative change of the prediction, that a head masked alone may cause.
        step_tolerance: D of all layers masked by the profile at a denoising step, above which the step stays dense.
        eps: weight above which attention is heavy, for the list of sinks.
        file: profile that videos are drawn by; None takes the one that this study finds.
    """

    name = "profile"
    question = "Which share of its attention weights can each layer and head lose, and at which steps?"

    def __init__(
        self,
        *,
        ratios: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9),
        tolerance: float = 1e-4,
        step_tolerance: float = 1e-2,
        eps: float = 0.3,
        file: Path | None = None,
    ) -> None:
        self.ratios, self.tolerance, self.step_tolerance, self.file = tuple(ratios), tolerance, step_tolerance, file
        self.eps = eps
        self._profile: AttentionProfile | None = None

    def check(self, work: Workbench) -> None:
        rising = bool(self.ratios) and list(self.ratios) == sorted(set(self.ratios))
        if not rising or not all(0.0 < ratio < 1.0 for ratio in self.ratios):
            raise ValueError(f"got ratios {list(self.ratios)}, expected rising shares above 0 and below 1.")
        if not (self.tolerance > 0.0 and self.step_tolerance > 0.0):
            raise ValueError(
                f"got tolerance {self.tolerance} and step_tolerance {self.step_tolerance}, expected numbers above 0."
            )
        check_eps([self.eps], self.eps)
        if self.file is not None:
            profile = AttentionProfile.read(self.file)
            profile.check(work.facts.num_blocks, work.heads)
            if profile.dense_steps and profile.steps != work.sampling.steps:
                raise ValueError(
                    f"got {work.sampling.steps} steps, expected {profile.steps}: {self.file} names dense steps among "
                    "as many. Give --steps."
                )

    def variants(self, work: Workbench) -> list[str]:
        return [] if self.file is not None else [_SINKS, *(f"layer-{layer:02d}" for layer in work.layers)]

    def effort(self, settings: StudySettings) -> Effort:
        heads = len(settings.studied_heads)
        scanned = 0 if self.file is not None else len(settings.layers) * heads * len(self.ratios) + 1
        return Effort(videos=2, repeats=int(self.file is None), conditional_repeats=scanned)

    def follow_up(self, results: Results, work: Workbench) -> list[str]:
        if results.has(_PROFILE):
            return []
        if self.file is not None:
            self._profile = AttentionProfile.read(self.file)
            return [_PROFILE, _UNIFORM]
        if not results.has(_STEPS):
            self._profile = self._borne(results, work)
            return [_STEPS]
        self._profile = self._with_steps(results, work)
        return [_PROFILE, _UNIFORM]

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        if unit.variant.startswith("layer"):
            return Measured(self._heads(unit, work, int(unit.variant.partition("-")[2])))
        if unit.variant == _SINKS:
            return Measured(record(work, unit.prompt, unit.seed, (self.eps,)))
        assert self._profile is not None
        profile = self._profile
        if unit.variant == _STEPS:
            return Measured({"D": np.array(self._by_step(unit, work, profile))})
        functions = profile.functions(lambda: work.denoiser.step)
        if unit.variant == _UNIFORM:
            functions = profile.uniform().functions(lambda: work.denoiser.step)
        video = work.draw(unit.prompt, unit.seed, functions)
        reference = work.dense(unit.prompt, unit.seed).pixels
        return Measured({name: np.array(value) for name, value in distances(video, reference).items()}, video)

    def _by_step(self, unit: Unit, work: Workbench, profile: AttentionProfile) -> list[float]:
        """D of the conditional pass at each measured step, all layers masked by the profile."""
        functions = profile.functions(lambda: -1)
        found: dict[int, list[float]] = {step: [] for step in work.measured_steps}
        for call in work.conditional_calls(unit.prompt, unit.seed):
            found[call.step].append(work.relative_errors(call, functions)[CONDITIONAL])
        return [sum(errors) / len(errors) for errors in found.values()]

    def _heads(self, unit: Unit, work: Workbench, layer: int) -> dict[str, NDArray]:
        """D of the conditional pass, (h, R), and that of the worst measured step, (h, R); NaN for heads not studied."""
        mean, worst = np.full((2, work.heads, len(self.ratios)), np.nan)
        for head in work.studied_heads:
            for place, ratio in enumerate(self.ratios):
                mask = BottomMask(ratio, heads=[head])
                found = [
                    work.relative_errors(call, {layer: mask.attend})[CONDITIONAL]
                    for call in work.conditional_calls(unit.prompt, unit.seed)
                ]
                mean[head, place], worst[head, place] = np.mean(found), np.max(found)
        return {"D": mean, "worst": worst}

    def _shares(self, results: Results, work: Workbench) -> NDArray:
        """The largest ratio that is borne together with all below it, (Ly, h).

        Borne is one whose D, the mean over prompts of the worst measured step, is at most `tolerance`.
        """
        found = []
        for layer in work.layers:
            borne = results.stack(f"layer-{layer:02d}", "worst").mean(axis=0) <= self.tolerance  # (h, R)
            count = np.logical_and.accumulate(borne, axis=1).sum(axis=1)
            found.append(np.array([0.0, *self.ratios])[count])
        return np.array(found)

    def _borne(self, results: Results, work: Workbench) -> AttentionProfile:
        shares = self._shares(results, work)
        return AttentionProfile(
            base={"folder": str(work.base), "blocks": work.facts.num_blocks, "heads": work.heads},
            tolerance=self.tolerance, ratios=self.ratios, steps=work.sampling.steps, dense_steps=(),
            layers={layer: tuple(map(float, shares[place])) for place, layer in enumerate(work.layers)},
            sinks=self._sinks(results, work),
        )  # fmt: skip

    def _sinks(self, results: Results, work: Workbench) -> tuple[tuple[int, int, float], ...]:
        """(layer, head, share of conditional calls) of heads with a sink on any call."""
        share = with_sink(results.stack(_SINKS, f"fraction_{CONDITIONAL}")[..., 0]).mean(axis=(0, 1))  # (Ly, h)
        return tuple((work.layers[row], int(head), float(share[row, head])) for row, head in np.argwhere(share > 0))

    def _with_steps(self, results: Results, work: Workbench) -> AttentionProfile:
        """The profile with the steps that stay dense: each follows the nearest measured one."""
        change = results.stack(_STEPS, "D").mean(axis=0)
        measured = np.array(work.measured_steps)
        nearest = [int(np.abs(measured - step).argmin()) for step in range(work.sampling.steps)]
        dense = tuple(step for step, place in enumerate(nearest) if change[place] > self.step_tolerance)
        return replace(self._borne(results, work), dense_steps=dense)

    def findings(self, results: Results, work: Workbench) -> Findings:
        found, prompts = Findings(), results.prompts
        profile = self._profile
        assert profile is not None
        shares = np.array([profile.layers[layer] for layer in profile.layers])
        dense_layers = [layer for layer, ratios in profile.layers.items() if not any(ratios)]
        found.sentences.append(
            f"Heads bear a share of {profile.mean_ratio:.2f} of their weights removed on average, each alone at "
            f"D ≤ {profile.tolerance:g}. Layers that stay dense: {dense_layers or 'none'}; steps that stay dense: "
            f"{list(profile.dense_steps) or 'none'} of {profile.steps}."
        )
        found.values["profile"] = profile.fields()
        found.files["profile.json"] = profile.fields()
        found.figures["profile"] = (
            "Share of its smallest attention weights that each head bears to lose, masked alone.",
            heat_map(
                shares, x_label="head", y_label="layer", y_ticks=list(profile.layers), value_label="share",
                limits=(0.0, 1.0),
            ),
        )  # fmt: skip
        if results.has(_STEPS):
            mean, low, high = mean_interval(results.stack(_STEPS, "D"), prompts)
            found.tables["steps"] = Table(
                "All layers masked by the profile, at single steps", ("step", "D", "low", "high"),
                [[s, float(m), float(a), float(b)]
                 for s, m, a, b in zip(work.measured_steps, mean, low, high, strict=True)],
                f"Steps above {self.step_tolerance:g} stay dense, and those nearest to them. {interval_note(prompts)}",
            )  # fmt: skip
        rows: list[list[object]] = []
        for title, variant in (("by the profile", _PROFILE), ("every head alike, as much on average", _UNIFORM)):
            row: list[object] = [title, profile.mean_ratio]
            for name in ("psnr", "ssim", "coarse", "colour"):
                row.append(mean_text(results.stack(variant, name), prompts))
            rows.append(row)
        gain = results.stack(_PROFILE, "psnr") - results.stack(_UNIFORM, "psnr")
        found.sentences.append(
            f"Videos masked by the profile are {mean_text(gain, prompts)} dB nearer to the "
            "dense ones than with every head masked alike, at the same steps."
        )
        found.tables["videos"] = Table(
            "Whole videos against the dense ones",
            ("masked", "mean share", "PSNR (dB)", "SSIM", "coarse", "colour"), rows, interval_note(prompts),
        )  # fmt: skip
        found.limits += [
            "Shares are of an oracle that knows the dense weights. An engine that guesses them loses more.",
            "Heads are measured alone; together they change more, which the table of steps and the videos show.",
            "Prompts that the profile was made with are those that it is tried on here: use --file with other prompts "
            "for an honest distance.",
        ]
        return found
