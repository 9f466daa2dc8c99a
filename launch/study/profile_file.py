"""The file that the study `profile` writes for sparse-attention engines, its reader, and masked drawing by it.

JSON, format 1:

    format        "reblock attention profile 1"
    base          what was measured: folder, blocks, heads
    tolerance     D, the relative change of the prediction, that a head masked alone may cause
    ratios        the shares that were tried
    steps         number of denoising steps that the measurement drew with
    dense_steps   denoising steps, from 0, at which nothing should be masked
    layers        block -> heads: share of each head's smallest weights that it bears, 0 to stay dense
    sinks         [block, head, share of calls in which it is a sink] of every head that was one; their key stays
    keep          "row maximum": a row's largest weight, and so a sink, is never removed

Legend: B rows, N vision tokens, L text tokens, h heads, d head width.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.files import write_json
from launch.study.recorders import row_by_row
from trainer.attention import masked_attention, pooled_quantiles
from trainer.models.layout import AttentionFunction

FORMAT = "reblock attention profile 1"


@dataclass(frozen=True, kw_only=True)
class AttentionProfile:
    """How much each head of a model bears to be masked; fields as in the file.

    Args:
        base: folder, blocks and heads of the model.
        tolerance: relative change of the prediction that a head masked alone may cause.
        ratios: shares that were tried, rising.
        steps: denoising steps of the measurement.
        dense_steps: steps at which nothing is masked.
        layers: block -> share that each head bears.
        sinks: (block, head, share of calls) of heads that were sinks.
    """

    base: Mapping[str, Any]
    tolerance: float
    ratios: tuple[float, ...]
    steps: int
    dense_steps: tuple[int, ...]
    layers: Mapping[int, tuple[float, ...]]
    sinks: tuple[tuple[int, int, float], ...] = field(default=())

    def fields(self) -> dict[str, Any]:
        """What the file holds."""
        layers = {str(layer): list(heads) for layer, heads in self.layers.items()}
        return {"format": FORMAT, **asdict(self), "layers": layers, "keep": "row maximum"}

    def write(self, path: Path) -> None:
        """Writes the file."""
        write_json(path, self.fields())

    def uniform(self) -> "AttentionProfile":
        """The profile with the mean share in every head, as a control."""
        return replace(self, layers={layer: (self.mean_ratio,) * len(heads) for layer, heads in self.layers.items()})

    @classmethod
    def read(cls, path: Path) -> "AttentionProfile":
        """Reads a file.

        Raises:
            ValueError: if it is no such file, or a value is out of range.
        """
        try:
            fields = json.loads(path.read_text())
            if fields.pop("format") != FORMAT:
                raise ValueError(f"{path} is of another format, expected {FORMAT!r}.")
            fields.pop("keep", None)
            layers = {int(layer): tuple(map(float, heads)) for layer, heads in fields.pop("layers").items()}
            sinks = tuple((int(layer), int(head), float(share)) for layer, head, share in fields.pop("sinks"))
            for name in ("ratios", "dense_steps"):
                fields[name] = tuple(fields[name])
            found = cls(layers=layers, sinks=sinks, **fields)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is no attention profile ({error!r}); expected {FORMAT!r}.") from error
        wrong = [heads for heads in layers.values() if not all(0.0 <= ratio < 1.0 for ratio in heads)]
        if wrong:
            raise ValueError(f"{path}: got shares {list(wrong[0])}, expected 0 <= share < 1.")
        return found

    def check(self, blocks: int, heads: int) -> None:
        """Checks that the profile is of a model with so many blocks and heads.

        Raises:
            ValueError: if it is not.
        """
        unknown = sorted(set(self.layers) - set(range(blocks)))
        other = sorted({len(ratios) for ratios in self.layers.values()} - {heads})
        if unknown or other:
            raise ValueError(
                f"got a profile of blocks {sorted(self.layers)} and {other or heads} heads, expected blocks 0 .. "
                f"{blocks - 1} and {heads} heads: it is of another model."
            )

    @property
    def mean_ratio(self) -> float:
        """Mean share over layers and heads, at steps that are masked."""
        shares = [ratio for ratios in self.layers.values() for ratio in ratios]
        return sum(shares) / len(shares) if shares else 0.0

    def functions(self, step: Callable[[], int]) -> dict[int, AttentionFunction]:
        """Attention by layer that masks what each head bears.

        Args:
            step: gives the denoising step of a call.
        """
        return {
            layer: _masked_by_head(ratios, self.dense_steps, step)
            for layer, ratios in self.layers.items()
            if any(ratios)
        }


def _masked_by_head(
    ratios: tuple[float, ...], dense_steps: tuple[int, ...], step: Callable[[], int]
) -> AttentionFunction:
    def mask(q: Tensor, k: Tensor, v: Tensor, row: int) -> Tensor | None:
        if step() in dense_steps:
            return None
        different = sorted(set(ratios))
        quantiles = pooled_quantiles(q, k, different)  # (1, h, R)
        chosen = torch.tensor([different.index(ratio) for ratio in ratios], device=q.device)
        thresholds = quantiles.gather(2, chosen[None, :, None])[..., 0]
        thresholds = thresholds.masked_fill(torch.tensor([ratio == 0.0 for ratio in ratios], device=q.device), 0.0)
        return masked_attention(q, k, v, thresholds)[0]

    return row_by_row(mask)
