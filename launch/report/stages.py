"""The measurements of one stage, as the report reads them.

Legend: P prompts, S sigmas, Ly measured layers, h heads, E eps values, K scopes, R ratios.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from trainer.callbacks.intervals import Interval, bootstrap, few_prompts
from trainer.callbacks.masking_statistics import (
    PER_PROBE,
    TOLERATED,
    UNMEASURED,
    bears_on_attention,
    critical_ratio,
    masking_figures,
)

Head = tuple[int, int]  # layer, head
Arrays = Mapping[str, NDArray]
Ends = tuple[float, float]  # of an interval


def stage_title(stage: str) -> str:
    """Name of a stage on the page: epoch-004 gives "epoch 4"."""
    return f"epoch {int(stage.removeprefix('epoch-'))}" if stage.startswith("epoch-") else stage


@dataclass(frozen=True)
class SinkStage:
    """The sink measurement of one stage.

    Args:
        stage: name of the stage: base, epoch-000, epoch-001, ...
        arrays: content of sinks-STAGE.npz.
    """

    stage: str
    arrays: Arrays

    @property
    def eps(self) -> float:
        """The eps above which an attention weight counts as heavy in the verdicts."""
        return float(self.arrays["default_eps"])

    @property
    def layers(self) -> list[int]:
        """Indices of the measured layers, (Ly,)."""
        return [int(layer) for layer in self.arrays["layers"]]

    @property
    def frequency(self) -> NDArray:
        """Share of prompts with a sink at `eps`, (S, Ly, h)."""
        index = int(np.argmin(np.abs(self.arrays["eps"] - self.eps)))
        return self.arrays["frequency"][..., index]

    @property
    def with_sink(self) -> NDArray:
        """Whether a head has a sink at `eps`, (P, S, Ly, h)."""
        index = int(np.argmin(np.abs(self.arrays["eps"] - self.eps)))
        return self.arrays["fraction"][..., index] > 0.5

    def frequency_at(self, head: Head, pick: Callable[[NDArray], int]) -> tuple[float, Ends | None]:
        """A head's frequency and its interval at one sigma.

        Args:
            head: (layer, head).
            pick: chooses the sigma's index from the frequencies (S,): np.argmin or np.argmax.
        """
        at = pick(self.select(self.frequency, head))
        index = int(np.argmin(np.abs(self.arrays["eps"] - self.eps)))
        ends = [
            float(self.select(self.arrays[name][..., index], head)[at])
            for name in ("frequency_low", "frequency_high")
            if name in self.arrays
        ]
        return float(self.select(self.frequency, head)[at]), (ends[0], ends[1]) if ends else None

    @property
    def flagged(self) -> list[Head]:
        """Consistent sink heads."""
        return [(self.layers[row], int(head)) for row, head in np.argwhere(self.arrays["consistent"])]

    def select(self, values: NDArray, head: Head) -> NDArray:
        """Entries of one head in `values` (..., Ly, h), as (...); NaN if the head was not measured."""
        if head[0] not in self.layers or head[1] >= values.shape[-1]:
            return np.full(values.shape[:-2], np.nan)
        return values[..., self.layers.index(head[0]), head[1]]

    def with_any_sink(self) -> list[Head]:
        """Heads that have a sink for at least one prompt and sigma."""
        return [(self.layers[row], int(head)) for row, head in np.argwhere((self.frequency > 0).any(axis=0))]


@dataclass(frozen=True)
class MaskingStage:
    """The masking measurement of one stage.

    Args:
        stage: name of the stage: base, epoch-000, epoch-001, ...
        arrays: content of masking-STAGE.npz.
        base_loss: dense loss of stage `base`, NaN if that was not measured.
    """

    stage: str
    arrays: Arrays
    base_loss: float = math.nan

    @property
    def scopes(self) -> list[str]:
        """Names of the sets of layers that were masked together, (K,)."""
        return [str(scope) for scope in self.arrays["scopes"]]

    @property
    def dense_loss(self) -> float:
        """L(0)."""
        return float(self.arrays["dense_loss"])

    @cached_property
    def figures(self) -> Arrays:
        """The arrays, `critical_ratio_of_base` and `uniform_cost` (K,); critical ratios that say nothing are NaN."""
        uniform = self.arrays["uniform_loss_increase"]
        of_base = critical_ratio(self.arrays["ratios"], self.arrays["loss_increase"], TOLERATED * self.base_loss)
        found = {**self.arrays, "uniform_cost": uniform / self.dense_loss}
        for name, ratio, loss in (
            ("critical_ratio", self.arrays["critical_ratio"], self.dense_loss),
            ("critical_ratio_of_base", of_base, self.base_loss),
        ):
            known = bears_on_attention(uniform, TOLERATED * loss) & np.isfinite(self.dense_loss)
            found[name] = np.where(known, ratio, np.nan)
        return found

    def value(self, name: str, scope: str = "retrained") -> float:
        """The entry of a scope in an array (K,) of `figures`; NaN if the scope was not measured."""
        return float(self.figures[name][self.scopes.index(scope)]) if scope in self.scopes else math.nan

    def blank(self, name: str, scope: str = "retrained") -> str:
        """Why the critical ratio `name` has no value; empty if it has one, or is not known for another reason."""
        loss = self.base_loss if name == "critical_ratio_of_base" else self.dense_loss
        if scope not in self.scopes:
            return "not measured: the scope is not in the recipe"
        if not math.isfinite(loss):
            return "not measured: the stage base was not" if name == "critical_ratio_of_base" else ""
        return UNMEASURED if self.value("uniform_loss_increase", scope) < TOLERATED * loss else ""

    @cached_property
    def tables(self) -> Arrays:
        """Figures of every probe (P, S, ...), as `masking_figures` names them; those of runs that kept them."""
        return {name: self.arrays[f"{name}_by_probe"] for name in PER_PROBE if f"{name}_by_probe" in self.arrays}

    def statistic(self, means: Arrays) -> Mapping[str, NDArray]:
        """Every figure that has an interval, from means over probes."""
        return masking_figures(means, self.arrays["ratios"], self.base_loss)

    @cached_property
    def intervals(self) -> Mapping[str, Interval]:
        """Figure -> ends of its interval, (), (K,) or (K, R); none where `no_interval` says why."""
        return {} if self.no_interval else bootstrap(self.statistic, self.tables, self.arrays["caption_ids"]) or {}

    @property
    def no_interval(self) -> str:
        """Why there are no intervals; empty if there are."""
        if not set(PER_PROBE) <= set(self.tables) or "caption_ids" not in self.arrays:
            return "the run kept no figures of every probe"
        return few_prompts(self.arrays["caption_ids"])

    def interval(self, name: str, scope: str = "retrained") -> Ends | None:
        """The interval of a scope's figure (K,); None without one, and where the figure itself is blank."""
        if name not in self.intervals or not math.isfinite(self.value(name, scope)):
            return None
        low, high = self.intervals[name]
        return float(low[self.scopes.index(scope)]), float(high[self.scopes.index(scope)])

    @property
    def dense_loss_interval(self) -> Ends | None:
        """The interval of L(0); None without one."""
        found = self.intervals.get("dense_loss")
        return None if found is None else (float(found[0]), float(found[1]))

    def curve(self, name: str, scope: str = "retrained") -> NDArray | None:
        """The row (R,) of a scope in an array (K, R); None if one of them was not measured."""
        return self.arrays[name][self.scopes.index(scope)] if scope in self.scopes and name in self.arrays else None
