"""`reblock study transfer`: a prompt's video, generated with the attention maps of another prompt.

Source and target are rows of one batch, so a map is used in the call that makes it and never stored.

Legend: P (prompt, seed) pairs, B rows of a call, N vision tokens, L text tokens, h heads, d head width.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.study.denoising import Functions
from launch.study.distances import distances
from launch.study.figures import curves
from launch.study.settings import StudySettings
from launch.study.statistics import interval_note, mean_interval, with_ends
from launch.study.study import Effort, Findings, Measured, Results, Study, Table, Unit
from launch.study.workbench import Workbench
from trainer.attention.interventions import transfer_within_batch
from trainer.models.layout import AttentionCall, AttentionFunction, dense_attention

Tokens = Literal["vision", "all"]

_ALL, _IDENTITY, _OTHER_SEED, _UNRELATED = "all", "identity", "other-seed", "unrelated"
#: Added to a seed for other noise.
_NEXT_SEED = 1000
#: Rows of a pass: the source's, then the target's.
_ROWS = 2

_TITLES = {
    _ALL: "next prompt, same noise: all layers",
    _IDENTITY: "control: same prompt, same noise",
    _OTHER_SEED: "control: same prompt, other noise",
    _UNRELATED: "control: another prompt, other noise",
}


class Source(NamedTuple):
    """Where maps come from."""

    prompt: int
    seed: int


class _Seen(Exception):
    """Ends a drawing once its first attention was seen."""


def source_rows(rows: int) -> list[int]:
    """For every row of a call the row whose map it uses: a target's is the source's of the same pass.

    Whether passes are calls of their own or one after the other in a call, a pass has two rows.
    """
    return [row - row % _ROWS for row in range(rows)]


def transferred(tokens: Tokens) -> AttentionFunction:
    """Attention in which the second row of every pass uses the map of the first.

    Args:
        tokens: `all` takes the source's q and k of all tokens, whose text must be as long as the target's; `vision`
            those of the vision tokens, and the target's own of the text.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        sources = source_rows(len(q))
        if tokens == "all":
            return transfer_within_batch(sources, attend=dense_attention)(q, k, v, call)  # type: ignore[arg-type]
        vision = call.layout.num_vision
        foreign_q, foreign_k = (torch.cat([x[sources, :, :vision], x[:, :, vision:]], dim=2) for x in (q, k))
        return dense_attention(foreign_q, foreign_k, v, call)

    return attend


class Transfer(Study):
    """Options of the study of transfer.

    Args:
        tokens: `vision` takes the source's queries and keys of vision tokens, and the target's own of the text; `all`
            those of all tokens, for which all captions must have equally many text tokens.
        by_layer: transfer in every studied layer alone, too; each takes a drawing.
    """

    name = "transfer"
    question = "What becomes of a video whose attention maps are those of another prompt?"

    def __init__(self, *, tokens: Tokens = "vision", by_layer: bool = True) -> None:
        self.tokens, self.by_layer = tokens, by_layer

    def check(self, work: Workbench) -> None:
        if self.tokens not in get_args(Tokens):
            raise ValueError(f"got tokens {self.tokens!r}, expected one of {', '.join(get_args(Tokens))}.")
        if len(work.prompts) < 2:
            raise ValueError("got 1 prompt, expected at least 2: each takes the maps of the next one.")
        if self.tokens == "all":
            lengths = [text_length(work, prompt) for prompt in range(len(work.prompts))]
            if len(set(lengths)) > 1:
                raise ValueError(
                    f"got tokens all and captions of {lengths} text tokens, expected equally many: a map's text keys "
                    "must be the target's too. Use --tokens vision, or prompts of one length."
                )

    def variants(self, work: Workbench) -> list[str]:
        layers = [f"layer-{layer:02d}" for layer in work.layers] if self.by_layer else []
        return [_ALL, *layers, _IDENTITY, _OTHER_SEED, _UNRELATED]

    @staticmethod
    def source(unit: Unit, work: Workbench) -> Source:
        """Where a unit's maps come from."""
        count = len(work.prompts)
        following, after_next = (unit.prompt + 1) % count, (unit.prompt + 2) % count
        if unit.variant == _IDENTITY:
            return Source(unit.prompt, unit.seed)
        if unit.variant == _OTHER_SEED:
            return Source(unit.prompt, unit.seed + _NEXT_SEED)
        if unit.variant == _UNRELATED:
            return Source(after_next if count > 2 else following, unit.seed + _NEXT_SEED)
        return Source(following, unit.seed)

    @classmethod
    def decoy(cls, unit: Unit, work: Workbench) -> int:
        """A prompt that is neither a unit's target nor its source, of three or more."""
        count, source = len(work.prompts), cls.source(unit, work).prompt
        return next(i % count for i in (unit.prompt + 2, unit.prompt + 1) if i % count != source)

    def functions(self, unit: Unit, work: Workbench) -> Functions:
        """Attention of the layers in which a unit transfers."""
        kind, _, which = unit.variant.partition("-")
        layers = [int(which)] if kind == "layer" else work.layers
        return dict.fromkeys(layers, transferred(self.tokens))

    def effort(self, settings: StudySettings) -> Effort:
        return Effort(together=(len(settings.layers) if self.by_layer else 0) + 4)

    def measure(self, unit: Unit, work: Workbench) -> Measured:
        source = self.source(unit, work)
        captions = [work.prompts[source.prompt], work.prompts[unit.prompt]]
        noise = [work.noise_seed(unit.prompt, seed) for seed in (source.seed, unit.seed)]  # of the target's prompt
        given, video = work.denoiser.draw_together(captions, noise, self.functions(unit, work))
        target = work.dense(unit.prompt, unit.seed).pixels
        arrays = {f"target_{name}": value for name, value in distances(video, target).items()}
        arrays |= {f"source_{name}": value for name, value in distances(video, given).items()}
        apart = distances(target, given)
        arrays |= {f"apart_{name}": value for name, value in apart.items()}
        same = source == Source(unit.prompt, unit.seed)
        arrays["pull"] = np.nan if same else pull(arrays["source_coarse"], apart["coarse"])
        arrays["decoy_pull"] = np.nan
        if len(work.prompts) > 2:
            decoy = work.dense(self.decoy(unit, work), unit.seed).pixels
            between = [distances(pixels, decoy)["coarse"] for pixels in (video, target)]
            arrays["decoy_pull"] = pull(*between)
        side_by_side = np.concatenate([given, target, video], axis=2)
        return Measured({name: np.array(value) for name, value in arrays.items()}, side_by_side)

    def findings(self, results: Results, work: Workbench) -> Findings:
        found, prompts = Findings(), results.prompts

        def mean(variant: str, name: str) -> tuple[float, float, float]:
            values = mean_interval(results.stack(variant, name), prompts)
            return float(values[0]), float(values[1]), float(values[2])

        found.sentences.append(
            f"With the maps of the next prompt in all studied layers, SSIM is {with_ends(*mean(_ALL, 'target_ssim'))} "
            f"to the target's own video and {with_ends(*mean(_ALL, 'source_ssim'))} to the source's; these two have "
            f"{with_ends(*mean(_ALL, 'apart_ssim'))} between them. The same transfer from the target itself, which "
            f"changes nothing but rounding, has {with_ends(*mean(_IDENTITY, 'target_ssim'))}."
        )
        if len(work.prompts) > 2:
            found.sentences.append(
                "In means over squares of 16 pixels, colour included, the video moves "
                f"{with_ends(*mean(_ALL, 'pull'))} of the way to the source's, and "
                f"{with_ends(*mean(_ALL, 'decoy_pull'))} of the way to that of a third prompt with the same noise, "
                "which gave no maps."
            )
        found.tables["transfers"] = self._table(results, [_ALL, _IDENTITY, _OTHER_SEED, _UNRELATED])
        found.values["transfers"] = {
            variant: {name: mean(variant, name)[0] for name in ("target_psnr", "target_ssim", "source_ssim", "pull")}
            for variant in (_ALL, _OTHER_SEED, _UNRELATED)
        }
        if self.by_layer:
            self._layers(found, results, work)
        found.limits += [
            "Values still are the target's, and what they hold follows from all layers before.",
            "With tokens vision, the source's vision queries meet the target's text keys: how much of a row goes to "
            "text is neither the source's nor the target's.",
            "The coarse distance, and with it the pull, includes colour. Where prompts name other colours it is mostly "
            "that, and a shape or place that follows the source moves it little: a pull near 0 does not say that "
            "nothing of the source came along. Look at the clips.",
            "Distances are of pixels. Another object at the same place may be near; the same object elsewhere is far. "
            "The clips show source, target and transferred video, from left to right.",
        ]
        return found

    def _table(self, results: Results, variants: list[str]) -> Table:
        names = ("psnr", "ssim", "coarse", "colour")
        columns = [f"{title} {name}" for title in ("to target:", "to source:", "target to source:") for name in names]
        rows = []
        for variant in variants:
            keys = [f"{to}_{name}" for to in ("target", "source", "apart") for name in names] + ["pull", "decoy_pull"]
            rows.append([_TITLES[variant], *(_cell(results, variant, key) for key in keys)])
        note = (
            "PSNR in dB (100: identical). Pull: 1 − coarse distance from the source's video after transfer, divided by "
            "before; 0 if nothing moved, 1 at the source. Decoy pull: the same towards the video of a third prompt, "
            "which gave no maps. " + interval_note(results.prompts)
        )
        return Table("Whole videos", ("maps from", *columns, "pull", "decoy pull"), rows, note)

    def _layers(self, found: Findings, results: Results, work: Workbench) -> None:
        variants = [f"layer-{layer:02d}" for layer in work.layers]
        keys = ("target_coarse", "target_ssim", "target_psnr", "source_ssim", "pull", "decoy_pull")
        ends = {
            key: mean_interval(np.stack([results.stack(v, key) for v in variants], axis=1), results.prompts)
            for key in keys
        }
        order = np.argsort(-ends["target_coarse"][0], kind="stable").tolist()
        first = order[0]
        centre, lower, upper = (float(end[first]) for end in ends["target_coarse"])
        median = float(np.median(ends["target_coarse"][0]))
        found.sentences.append(
            f"Of single layers, layer {work.layers[first]} changes the video most: {with_ends(centre, lower, upper)} "
            f"(root mean square of squares of 16 pixels); the median layer {median:.3g}."
        )
        found.values["layers"] = {
            str(layer): {key: float(ends[key][0][i]) for key in keys} for i, layer in enumerate(work.layers)
        }
        found.tables["layers"] = Table(
            "One layer at a time, maps of the next prompt with the same noise",
            (
                "layer",
                "to target: coarse",
                "to target: SSIM",
                "to target: PSNR",
                "to source: SSIM",
                "pull",
                "decoy pull",
            ),
            [[work.layers[i], *(_cell(results, variants[i], key) for key in keys)] for i in order],
            "The layer that changes the target's video most comes first. " + interval_note(results.prompts),
        )
        mean, low, high = ends["target_coarse"]
        found.figures["layers"] = (
            "By how much the target's video changes if one layer takes the maps of the next prompt.",
            curves({"": (work.layers, mean, (low, high))}, x_label="layer", y_label="coarse distance to the target"),
        )
        lines: dict[str, tuple[list[int], NDArray, tuple[NDArray, NDArray]]] = {}
        for key, title in (("pull", "towards the source"), ("decoy_pull", "towards a third prompt's video")):
            mean, low, high = ends[key]
            if np.isfinite(mean).all():
                lines[title] = (work.layers, mean, (low, high))
        found.figures["pull"] = (
            "How far of the way to the source's video the target's moves, colour included, beside the video of a third "
            "prompt (control).",
            curves(lines, x_label="layer", y_label="pull"),
        )


def pull(after: float, before: float) -> float:
    """How far of the way to another video a video has moved: 1 - after / before; NaN if it was there already."""
    return 1 - after / before if before > 0 else float("nan")


def text_length(work: Workbench, prompt: int) -> int:
    """Text tokens of a prompt among the keys, 0 in self-attention of vision. Runs the model up to its first block."""
    lengths: list[int] = []

    def see(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        lengths.append(call.layout.text_lengths[-1] if call.layout.text_tokens else 0)  # the last row is conditional
        raise _Seen

    try:
        work.denoiser.draw(work.prompts[prompt], 0, {0: see})
    except _Seen:
        return lengths[0]
    raise RuntimeError("the model ran without attention in its first block")


def _cell(results: Results, variant: str, name: str) -> str:
    mean, low, high = mean_interval(results.stack(variant, name), results.prompts)
    return "" if np.isnan(mean) else with_ends(float(mean), float(low), float(high))
