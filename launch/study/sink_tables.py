"""What the records of all drawings say of one pass: how often heads have a sink, where, how important their keys are.

Legend: P (prompt, seed) pairs, S kept steps, Ly studied layers, h studied heads, E eps values.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launch.study.sink_records import Head, chosen, consistent, head_names, with_sink
from launch.study.study import Results
from launch.study.workbench import Workbench
from trainer.callbacks.activations import MAGNITUDE, TIMES_MEDIAN
from trainer.callbacks.intervals import wilson_interval
from trainer.callbacks.positions import position_p_values

#: Variant of the units that hold records.
RECORDS = "records"

#: Figures without an axis of heads.
_OF_STREAM = "stream_"


@dataclass(frozen=True)
class Usual:
    """The commonest of some values.

    Args:
        value: it; -1 of none.
        share: of the values that are equal to it.
    """

    value: int
    share: float

    @classmethod
    def of(cls, values: NDArray) -> "Usual":
        """The commonest of integers of any shape; among equals the smallest."""
        if not values.size:
            return cls(-1, float("nan"))
        names, counts = np.unique(values, return_counts=True)
        return cls(int(names[counts.argmax()]), float(counts.max() / values.size))


def independent_owners(pairs: Sequence[tuple[int, int]], *, own_noise: bool) -> dict[int, int]:
    """The pairs (prompt, seed) that a test of positions may use, and the cluster of each: index of the pair -> cluster.

    Where a sink lies may depend on the prompt and on the noise in any way. Clusters must share neither. With noise of
    its own, a prompt with all its seeds is one. Where prompts share their noise, two pairs of one seed are no
    independent draws, nor are two of one prompt: then the i-th prompt with the i-th seed is left of each, and with one
    seed a single pair, on which p is 1.

    Args:
        pairs: (prompt, seed) in order.
        own_noise: whether every prompt has noise of its own.
    """
    if own_noise:
        return {index: prompt for index, (prompt, _) in enumerate(pairs)}
    prompts, seeds = (sorted(set(names)) for names in zip(*pairs, strict=True))
    return {pairs.index(pair): pair[0] for pair in zip(prompts, seeds, strict=False)}


class PassSinks:
    """The records of one pass.

    Args:
        results: of a study whose units `RECORDS` hold what `record` gave.
        name: of the pass.
        work: the workbench.
        eps: E thresholds of the records.
        default_eps: the one that counts.
    """

    def __init__(self, results: Results, name: str, work: Workbench, eps: Sequence[float], default_eps: float) -> None:
        self.name, self.layers, self.heads, self.grid = name, work.layers, work.studied_heads, work.grid
        self.steps = work.measured_steps
        self.owners = independent_owners(results.pairs, own_noise=work.config.own_noise)
        self.prompts, self.eps, self._at = results.prompts, list(eps), list(eps).index(default_eps)
        unit = next(iter(results))
        figures = [key.removesuffix(f"_{name}") for key in results[unit] if key.endswith(f"_{name}")]
        self._tables = {figure: results.stack(RECORDS, f"{figure}_{name}") for figure in figures}

    def __getitem__(self, figure: str) -> NDArray:
        """A figure, (P, S, Ly, h), at the default eps; of a stream (P, S, Ly)."""
        table = self._tables[figure]
        if figure.startswith(_OF_STREAM):
            return table
        table = table[:, :, :, self.heads]
        return table[..., self._at] if table.ndim == 5 else table

    @cached_property
    def by_eps(self) -> NDArray:
        """Whether a head has a sink, (P, S, Ly, h, E)."""
        return with_sink(self._tables["fraction"])[:, :, :, self.heads]

    @property
    def verdict(self) -> NDArray:
        """The same at the default eps, (P, S, Ly, h)."""
        return self.by_eps[..., self._at]

    @property
    def frequency(self) -> NDArray:
        """Share of pairs and steps with a sink, (Ly, h)."""
        return self.verdict.mean(axis=(0, 1))

    @property
    def consistent(self) -> list[Head]:
        """Heads that have a sink nearly always."""
        return chosen(consistent(self.verdict), self.layers, self.heads)

    @property
    def ever(self) -> list[Head]:
        """Heads that have a sink on any call, the most frequent first."""
        found = chosen(np.any(self.verdict, axis=(0, 1)), self.layers, self.heads)
        return sorted(found, key=lambda head: (-float(self.frequency[self.place(head)]), head))

    def place(self, head: Head) -> tuple[int, int]:
        """Where a head is in tables of (Ly, h)."""
        return self.layers.index(head[0]), self.heads.index(head[1])

    def interval(self, shares: NDArray) -> tuple[NDArray, NDArray]:
        """Wilson's interval of shares; a prompt is one trial, with its mean over steps and seeds as the outcome."""
        prompts = len(set(self.prompts))
        return wilson_interval(shares * prompts, prompts)

    def of_sinks(self, figure: str, head: Head) -> NDArray:
        """A figure of a head on the calls on which it has a sink."""
        row, column = self.place(head)
        return self[figure][:, :, row, column][self.verdict[:, :, row, column]]

    def token(self, index: int) -> str:
        """(t, y, x) of a vision token."""
        return "-" if index < 0 else ", ".join(str(int(i)) for i in np.unravel_index(index, self.grid))

    def of_heads(self, table: NDArray) -> NDArray:
        """The columns of `ever` of a table (rows, Ly, h)."""
        rows, columns = zip(*(self.place(head) for head in self.ever), strict=True)
        return table[:, list(rows), list(columns)]

    @property
    def drawings(self) -> int:
        """How many independent drawings the test of positions has."""
        return len(set(self.owners.values()))

    def position_p(self, head: Head | None = None) -> dict[str, float]:
        """p-values of evenly spread sinks, of one head or all together: `frame_p`, `place_p`; NaN with one drawing."""
        if self.drawings < 2:
            return {"frame_p": math.nan, "place_p": math.nan}
        rows = list(self.owners)
        key, verdict = self["key"][rows], self.verdict[rows]
        if head is not None:
            row, column = self.place(head)
            where = np.s_[:, :, row : row + 1, column : column + 1]
            key, verdict = key[where], verdict[where]
        return position_p_values(key, verdict, self.grid, list(self.owners.values()))

    def counts(self) -> tuple[NDArray, NDArray]:
        """Sinks by head of `ever` and latent frame, (heads, t), and by place in the frame, (y, x)."""
        frames, height, width = self.grid
        rows, places = [], np.zeros(height * width, int)
        for head in self.ever:
            frame, place = np.divmod(self.of_sinks("key", head).astype(int), height * width)
            rows.append(np.bincount(frame, minlength=frames))
            places += np.bincount(place, minlength=height * width)
        return np.stack(rows), places.reshape(height, width)

    # -- rows of tables ----------------------------------------------------------------------------------------------

    def head_rows(self) -> list[list[object]]:
        """A row for each head that ever has a sink."""
        low, high = self.interval(self.frequency)
        named = set(self.consistent)
        rows: list[list[object]] = []
        for head in self.ever:
            place, p, key = self.place(head), self.position_p(head), Usual.of(self.of_sinks("key", head))
            rows.append([
                self.name, *head, float(self.frequency[place]), float(low[place]), float(high[place]),
                "yes" if head in named else "no", self.mean("fraction", head), self.mean("alpha", head),
                self.mean("value_norm_ratio", head), self.mean("projected_value_norm_ratio", head),
                self.token(key.value), key.share, p["frame_p"], p["place_p"],
            ])  # fmt: skip
        return rows

    def mean(self, figure: str, head: Head) -> float:
        """Mean of a figure of a head over the calls on which it has a sink."""
        return float(self.of_sinks(figure, head).mean())

    def eps_rows(self) -> list[list[object]]:
        """A row for each eps."""
        rows: list[list[object]] = []
        for i, eps in enumerate(self.eps):
            frequency = self.by_eps[..., i].mean(axis=(0, 1))
            low, high = self.interval(frequency.max())
            heads = int(consistent(self.by_eps[..., i]).sum()), int(self.by_eps[..., i].any(axis=(0, 1)).sum())
            rows.append([self.name, eps, *heads, float(frequency.max()), float(low), float(high)])
        return rows

    def importance_rows(self, most: int) -> list[list[object]]:
        """A row for each of the heads with the most important keys."""
        importance = self["importance"].mean(axis=(0, 1))
        rows: list[list[object]] = []
        for index in np.argsort(-importance, axis=None, kind="stable")[:most]:
            row, column = np.unravel_index(index, importance.shape)
            key = Usual.of(self["alpha_key"][:, :, row, column])
            every = self["importance"][:, :, row, column]
            rows.append([
                self.name, self.layers[row], self.heads[column], float(importance[row, column]), float(every.min()),
                float(every.max()), self.token(key.value), key.share,
                float(self["text_importance"][:, :, row, column].mean()), float(self.frequency[row, column]),
            ])  # fmt: skip
        return rows

    def stream_rows(self) -> list[list[object]]:
        """A row for each layer's vision stream."""
        largest, median = self["stream_largest"], self["stream_median"]
        massive = (largest > MAGNITUDE) & (largest > TIMES_MEDIAN * median)
        rows: list[list[object]] = []
        for i, layer in enumerate(self.layers):
            token, channel = (Usual.of(self[f"stream_{name}"][:, :, i]) for name in ("token", "channel"))
            rows.append([
                self.name, layer, float(largest[:, :, i].mean()), float(median[:, :, i].mean()),
                float(self.times_median[i]), float(massive[:, :, i].mean()), self.token(token.value), token.share,
                channel.value, channel.share,
            ])  # fmt: skip
        return rows

    @property
    def times_median(self) -> NDArray:
        """Largest over median magnitude of each layer's stream, mean over pairs and steps, (Ly,)."""
        return (self["stream_largest"] / np.maximum(self["stream_median"], 1e-12)).mean(axis=(0, 1))

    def values(self) -> Mapping[str, object]:
        """Frequencies of the heads that ever have a sink, by step with intervals, for JSON."""
        by_step = self.verdict.mean(axis=0)  # (S, Ly, h)
        low, high = self.interval(by_step)
        found = {}
        for head, name in zip(self.ever, head_names(self.ever), strict=True):
            where = (slice(None), *self.place(head))
            found[name] = {
                "frequency": by_step[where].tolist(),
                "low": low[where].tolist(),
                "high": high[where].tolist(),
            }
        return found
