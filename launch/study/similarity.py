"""How alike maps of attention are: of one head in two drawings, beside other heads in the same two drawings.

All maps share much (a diagonal, frames), so a correlation by itself says little. Chance is what two drawings share when
the heads of one are permuted: the mean over all other heads.

Legend: Ly layers, h heads, K = Ly h, E entries of a map, C prompts, P (prompt, seed) pairs.
"""

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launch.study.statistics import mean_interval
from trainer.callbacks.intervals import bootstrap

#: A map whose standard deviation is below this share of its mean is constant: it has no correlation.
_CONSTANT = 1e-5

#: What `compare` gives.
FIGURES = ("same", "layer_others", "others", "recognised")

Ends = tuple[NDArray, NDArray, NDArray]


def correlations(first: NDArray, second: NDArray) -> NDArray:
    """Pearson correlation of every map (K, E) with every other one, (K, K); NaN where one of them is constant."""

    def standard(maps: NDArray) -> NDArray:
        maps = np.asarray(maps, np.float64)
        centred = maps - maps.mean(axis=1, keepdims=True)
        constant = centred.std(axis=1) <= _CONSTANT * np.abs(maps).mean(axis=1)
        norm = np.linalg.norm(centred, axis=1)
        return np.where(constant, np.nan, 1.0)[:, None] * centred / np.where(constant, 1.0, norm)[:, None]

    return standard(first) @ standard(second).T


def nan_mean(values: NDArray, axis: int | tuple[int, ...]) -> NDArray:
    """The mean without NaN; NaN where nothing else is."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of means over nothing
        return np.nanmean(values, axis=axis)


def compare(first: NDArray, second: NDArray) -> dict[str, NDArray]:
    """Compares the maps (Ly, h, ...) of two drawings; both directions count alike, so the order does not matter.

    Returns:
        Each (Ly, h): `same`, the correlation of a head's two maps; `layer_others` and `others`, the mean of its
        correlations with the other heads of its layer, and with all other heads; `recognised`, whether no other head
        is as like it as it is itself: a share among equals, 1 / K by chance. NaN where a map is constant.
    """
    layers, heads = first.shape[:2]
    table = correlations(first.reshape(layers * heads, -1), second.reshape(layers * heads, -1))
    own_layer = np.repeat(np.arange(layers), heads)
    own = np.eye(layers * heads, dtype=bool)
    beside = (own_layer[:, None] == own_layer) & ~own
    figures: dict[str, list[NDArray]] = {name: [] for name in FIGURES}
    for way in (table, table.T):
        same = np.diag(way)
        figures["same"].append(same)
        figures["layer_others"].append(nan_mean(np.where(beside, way, np.nan), 1))
        figures["others"].append(nan_mean(np.where(own, np.nan, way), 1))
        found = np.where(np.isnan(way), -np.inf, way)
        best = found >= found.max(axis=1, keepdims=True) - 1e-9
        figures["recognised"].append(np.where(np.isnan(same), np.nan, np.diag(best) / best.sum(axis=1)))
    return {name: np.mean(both, axis=0).reshape(layers, heads) for name, both in figures.items()}


def compare_steps(first: NDArray, second: NDArray) -> dict[str, NDArray]:
    """`compare` at every step of maps (steps, Ly, h, ...): means over the steps, each (Ly, h)."""
    found = [compare(a, b) for a, b in zip(first, second, strict=True)]
    return {name: nan_mean(np.stack([step[name] for step in found]), 0) for name in FIGURES}


def pair_interval(values: NDArray) -> Ends:
    """Mean over pairs of different prompts, and the ends of its 95 % interval over prompts.

    A prompt is in C - 1 pairs, so prompts are resampled, not pairs: a draw weighs a pair by how often it has both of
    its prompts. (An interval over the prompts' own means, each over its pairs, would be half as wide as it should be.)

    Args:
        values: (C, C, ...) symmetric; the diagonal is not read, and NaN is left out.

    Returns:
        Three arrays (...); the ends are NaN with fewer prompts than intervals need.
    """
    count = len(values)
    known = ~np.isnan(values) & ~np.eye(count, dtype=bool).reshape(count, count, *[1] * (values.ndim - 2))
    filled = np.where(known, values, 0.0)

    def mean(shares: NDArray) -> NDArray:
        """(B, C) -> (B, ...)."""
        total, weight = (
            np.einsum("ba,bc,ac...->b...", shares, shares, table, optimize=True)
            for table in (filled, known.astype(np.float64))
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            return total / weight

    centre = mean(np.full((1, count), 1 / count))[0]
    # A draw of one prompt alone has no pair.
    ends = bootstrap(
        lambda means: {"mean": np.where(np.isnan(found := mean(means["share"])), centre, found)},
        {"share": np.eye(count)[:, None]},
        range(count),
    )
    blank = np.full(values.shape[2:], np.nan)
    low, high = (blank, blank) if ends is None else ends["mean"]
    return centre, low, high


@dataclass(frozen=True)
class Compared:
    """Comparisons of one kind.

    Args:
        title: what is compared.
        figures: as `compare` gives; each (C, C, Ly, h) between prompts, else (P, Ly, h).
        prompts: of each of the P; None between prompts.
    """

    title: str
    figures: dict[str, NDArray]
    prompts: Sequence[int] | None

    def interval(self, values: NDArray) -> Ends:
        """Mean and ends over prompts of values with the leading axes of the figures."""
        return pair_interval(values) if self.prompts is None else mean_interval(values, self.prompts)

    def overall(self, name: str, minus: str | None = None) -> tuple[float, float, float]:
        """Mean over layers and heads of a figure, less another one, with its ends."""
        mean, low, high = self.interval(nan_mean(self._difference(name, minus), (-2, -1)))
        return float(mean), float(low), float(high)

    def by_layer(self, name: str) -> Ends:
        """Mean over heads of a figure, each (Ly,)."""
        return self.interval(nan_mean(self.figures[name], -1))

    def by_head(self, name: str, minus: str | None = None) -> NDArray:
        """A figure by layer and head, (Ly, h)."""
        return self.interval(self._difference(name, minus))[0]

    def _difference(self, name: str, minus: str | None) -> NDArray:
        return self.figures[name] - (0.0 if minus is None else self.figures[minus])


def between_prompts(maps: dict[tuple[int, int], NDArray], *, same_seed: bool = True) -> Compared | None:
    """Every two prompts, with the noise of one seed or of two.

    Args:
        maps: (prompt, seed) -> (steps, Ly, h, ...).
        same_seed: whether both are of one seed.

    Returns:
        None where there are no two prompts, or no two seeds for other seeds.
    """
    prompts, seeds = (sorted({pair[i] for pair in maps}) for i in (0, 1))
    pairs = [pair for pair in itertools.product(seeds, seeds) if (pair[0] == pair[1]) == same_seed]
    if len(prompts) < 2 or not pairs:
        return None
    shape = (len(prompts), len(prompts), *next(iter(maps.values())).shape[1:3])
    figures = {name: np.full(shape, np.nan) for name in FIGURES}
    for (i, a), (j, b) in itertools.combinations(enumerate(prompts), 2):
        found = [compare_steps(maps[a, s], maps[b, t]) for s, t in pairs]
        for name, table in figures.items():
            table[i, j] = table[j, i] = nan_mean(np.stack([one[name] for one in found]), 0)
    return Compared(f"other prompt, {'same' if same_seed else 'other'} seed", figures, None)


def between_seeds(maps: dict[tuple[int, int], NDArray]) -> Compared | None:
    """Every two seeds of each prompt; None where there is one seed. Args: as of `between_prompts`."""
    prompts, seeds = (sorted({pair[i] for pair in maps}) for i in (0, 1))
    if len(seeds) < 2:
        return None
    rows = []
    for prompt in prompts:
        found = [compare_steps(maps[prompt, s], maps[prompt, t]) for s, t in itertools.combinations(seeds, 2)]
        rows.append({name: nan_mean(np.stack([one[name] for one in found]), 0) for name in FIGURES})
    return Compared(
        "same prompt, other seed", {name: np.stack([row[name] for row in rows]) for name in FIGURES}, prompts
    )


def between_models(maps: dict[tuple[int, int], NDArray], others: dict[tuple[int, int], NDArray]) -> Compared:
    """Two models, drawn with the same prompts and seeds. Args: as of `between_prompts`."""
    pairs = sorted(maps)
    found = [compare_steps(maps[pair], others[pair]) for pair in pairs]
    figures = {name: np.stack([one[name] for one in found]) for name in FIGURES}
    return Compared("other model, same prompt and seed", figures, [prompt for prompt, _ in pairs])
