"""Means over (prompt, seed) pairs with intervals over prompts, as studies report them.

Legend: P (prompt, seed) pairs.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.callbacks.intervals import FEWEST, bootstrap


def mean_interval(values: ArrayLike, prompts: Sequence[int]) -> tuple[NDArray, NDArray, NDArray]:
    """Mean over pairs, and the ends of its 95 % interval over prompts.

    Args:
        values: (P, ...).
        prompts: the prompt of each pair; seeds of one prompt are resampled together.

    Returns:
        Three arrays (...); the ends are NaN with fewer than `FEWEST` prompts.
    """
    table = np.asarray(values, np.float64)
    ends = bootstrap(lambda means: means, {"value": table[:, None]}, prompts)
    blank = np.full(table.shape[1:], math.nan)
    low, high = (blank, blank) if ends is None else ends["value"]
    return table.mean(axis=0), low, high


def interval_note(prompts: Sequence[int]) -> str:
    """What to say of the intervals."""
    count = len(set(prompts))
    if count < FEWEST:
        return f"{count} prompts give no interval; {FEWEST} would."
    return f"In brackets: 95 % intervals over {count} prompts (bootstrap, seeds of a prompt together)."


def with_ends(mean: float, low: float, high: float, digits: int = 3) -> str:
    """A mean and its interval as text."""
    text = f"{mean:.{digits}g}"
    return text if math.isnan(low) else f"{text} [{low:.{digits}g}, {high:.{digits}g}]"


def mean_text(values: ArrayLike, prompts: Sequence[int]) -> str:
    """The mean over pairs of a figure (P,) with its interval, as text."""
    mean, low, high = mean_interval(values, prompts)
    return with_ends(float(mean), float(low), float(high))
