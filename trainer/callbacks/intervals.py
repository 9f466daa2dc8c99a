"""Intervals at 95 % over the prompts of a probe set, and of differences between two stages. Numpy alone.

Probes of one prompt are no independent draws: all its sigmas, and all samples with its caption, are resampled together.

Legend: P samples, S sigmas, C prompts (clusters of samples), B resamples.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Fewest prompts that an interval is given for. Where a difference has either sign by chance, n prompts agree with
#: probability 2 / 2^n, which is below 5 % from six on: with fewer, no interval that assumes nothing else reaches 95 %.
FEWEST = 6
#: The two-sided 95 % quantile of the standard normal.
Z95 = NormalDist().inv_cdf(0.975)

#: Degrees of freedom -> the two-sided 95 % quantile of Student's t.
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}

_RESAMPLES = 4000
_SEED = 20_261_127

#: Name -> means over the probes, (...) or (B, ...).
Means = Mapping[str, NDArray]
#: Name -> figures, of the same leading axes as the means that they come from.
Statistic = Callable[[Means], Mapping[str, NDArray]]
#: Lower and upper ends.
Interval = tuple[NDArray, NDArray]


def tail(prompts: int) -> float:
    """The share of resamples beyond each end of an interval at 95 %.

    A mean over n resampled prompts varies too little, by sqrt((n - 1) / n), and the normal quantile is too small for a
    variance that n prompts tell. So it is Phi(-sqrt(n / (n - 1)) t) in place of 2.5 %, with Student's quantile t of
    n - 1 degrees of freedom.

    Source: T. Hesterberg, "What teachers should know about the bootstrap", The American Statistician 69 (2015).
    """
    n = prompts - 1
    return NormalDist().cdf(-math.sqrt(prompts / n) * student_quantile(n))


def student_quantile(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t, to 0.001.

    Source: M. Abramowitz and I. A. Stegun, Handbook of Mathematical Functions: 26.7.5, an expansion for many degrees of
    freedom, and table 26.10 below five of them.

    Args:
        freedom: degrees of freedom, at least 1.
    """
    if freedom in _STUDENT:
        return _STUDENT[freedom]
    n, z = freedom, Z95
    return (
        z
        + (z**3 + z) / (4 * n)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4)
    )


def bootstrap(statistic: Statistic, tables: Mapping[str, NDArray], prompts: ArrayLike) -> dict[str, Interval] | None:
    """Percentile intervals of figures that are functions of means over the probes; the same at every call.

    Args:
        statistic: means -> figures.
        tables: name -> (P, S, ...) of every probe.
        prompts: (P,) the prompt of each sample; equal entries are one prompt.

    Returns:
        The figures' intervals; None with fewer than `FEWEST` prompts.
    """
    weights = _draw(prompts)
    return None if weights is None else _percentiles(statistic(_means(tables, weights)), prompts)


def paired_bootstrap(
    statistic: Statistic, before: Mapping[str, NDArray], after: Mapping[str, NDArray], prompts: ArrayLike
) -> dict[str, Interval] | None:
    """As `bootstrap`, of the figures of `after` minus those of `before`: the same probes, resampled alike in both."""
    weights = _draw(prompts)
    if weights is None:
        return None
    old, new = (statistic(_means(tables, weights)) for tables in (before, after))
    with np.errstate(invalid="ignore"):
        return _percentiles({name: new[name] - old[name] for name in new}, prompts)


def few_prompts(prompts: ArrayLike) -> str:
    """Why these prompts give no interval; empty if they are enough."""
    count = len(np.unique(np.asarray(prompts)))
    return f"{count} prompts give no interval, {FEWEST} would" if count < FEWEST else ""


def _draw(prompts: ArrayLike) -> NDArray | None:
    """How often each sample counts in each resample, (B, P); None with too few prompts."""
    names, place = np.unique(np.asarray(prompts), return_inverse=True)
    count = len(names)
    if count < FEWEST:
        return None
    drawn = np.random.default_rng(_SEED).multinomial(count, [1 / count] * count, size=_RESAMPLES)
    return drawn[:, place].astype(np.float64)


def _means(tables: Mapping[str, NDArray], weights: NDArray) -> dict[str, NDArray]:
    """Means over the probes of each resample: (P, S, ...) -> (B, ...)."""
    by_sample = {name: np.asarray(table, np.float64).mean(axis=1) for name, table in tables.items()}
    shares = weights / weights.sum(axis=1, keepdims=True)
    return {name: np.tensordot(shares, table, axes=1) for name, table in by_sample.items()}


def _percentiles(drawn: Mapping[str, NDArray], prompts: ArrayLike) -> dict[str, Interval]:
    beyond = tail(len(np.unique(np.asarray(prompts))))
    with np.errstate(invalid="ignore"):
        return {name: tuple(np.quantile(v, [beyond, 1 - beyond], axis=0)) for name, v in drawn.items()}  # type: ignore[misc]


def excludes_zero(interval: Interval | tuple[float, float] | None) -> bool:
    """Whether both ends have the same sign; False for no interval, and for one that is not finite."""
    return interval is not None and bool(interval[0] > 0 or interval[1] < 0) and bool(np.isfinite(interval).all())


def wilson_interval(successes: np.ndarray, trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's 95 % score interval of a proportion.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        successes: counts from 0 to `trials`, of any shape.
        trials: number of trials, at least 1.

    Returns:
        Lower and upper ends, float64, in the shape of `successes`.
    """
    share = np.asarray(successes, dtype=np.float64) / trials
    scale = 1 + Z95**2 / trials
    centre = (share + Z95**2 / (2 * trials)) / scale
    half = Z95 / scale * np.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    return np.clip(centre - half, 0.0, share), np.clip(centre + half, share, 1.0)


def run_difference(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """The interval of a difference of means over runs, `after` minus `before`: Student's, with one variance for both.

    It holds for other seeds, under the assumption that a figure is normal over them; an interval over prompts holds for
    these runs and other prompts.

    Args:
        before: a figure of each run.
        after: likewise.

    Returns:
        The ends; None with fewer than two runs on a side, and where a figure is not finite.
    """
    sides = [np.asarray(values, np.float64) for values in (before, after)]
    if min(map(len, sides)) < 2 or not all(np.isfinite(side).all() for side in sides):
        return None
    freedom = sum(len(side) - 1 for side in sides)
    variance = sum(((side - side.mean()) ** 2).sum() for side in sides) / freedom
    half = student_quantile(freedom) * math.sqrt(variance * sum(1 / len(side) for side in sides))
    difference = float(sides[1].mean() - sides[0].mean())
    return difference - half, difference + half


def share_difference(before: ArrayLike, after: ArrayLike, prompts: ArrayLike) -> Interval | None:
    """The interval of a share's difference between two stages, `after` minus `before`, paired by prompt.

    It has a width also where all prompts agree, which a bootstrap's has not. Each prompt counts as one trial with its
    mean as the outcome: outcomes between 0 and 1 vary less than those of a coin, so the interval is then too wide, not
    too narrow. Wilson's intervals, squared and added, with the outcomes' correlation, corrected for continuity.

    Source: R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data", Statistics in Medicine 17 (1998), method 10.

    Args:
        before: (P,) outcome of each sample, from 0 to 1.
        after: (P,) likewise.
        prompts: (P,) the prompt of each sample; equal entries are one prompt.

    Returns:
        The ends, (); None with fewer than `FEWEST` prompts.
    """
    if few_prompts(prompts):
        return None
    _, place = np.unique(np.asarray(prompts), return_inverse=True)
    size = np.bincount(place)
    outcomes = [np.bincount(place, np.asarray(values, np.float64)) / size for values in (before, after)]
    old, new = (values.mean() for values in outcomes)
    (old_low, old_high), (new_low, new_high) = (wilson_interval(mean * len(size), len(size)) for mean in (old, new))
    covariance = ((outcomes[0] - old) * (outcomes[1] - new)).mean()
    if covariance > 0:  # continuity: by chance a positive one would make the interval too narrow
        covariance = max(covariance - 0.5 / len(size), 0.0)
    spread = outcomes[0].std() * outcomes[1].std()
    correlation = covariance / spread if spread > 0 else 0.0

    def width(one: NDArray, other: NDArray) -> NDArray:
        return np.sqrt(np.maximum(one**2 + other**2 - 2 * correlation * one * other, 0.0))

    return new - old - width(new - new_low, old_high - old), new - old + width(new_high - new, old - old_low)
