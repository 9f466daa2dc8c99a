"""Whether sinks prefer some latent frame or some place in the frame: a permutation test by prompt. Numpy alone.

Legend: P samples, S sigmas, Ly layers, h heads, C prompts with a sink, M cells (latent frames, or places in the frame).
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: Permutations of a test: p is at least 1 / (1 + this).
PERMUTATIONS = 1999
_SEED = 20_261_127


def position_p_values(
    key: NDArray, with_sink: NDArray, grid: Sequence[int] | NDArray, prompts: ArrayLike
) -> dict[str, float]:
    """p-values of the null that sinks lie evenly: over latent frames, and over places (y, x) in the frame.

    As `evenness_p_value` computes them; NaN without a sink.

    Args:
        key: (P, S, Ly, h) vision token with the largest heavy share, x fastest, then y, then t.
        with_sink: (P, S, Ly, h) whether that is a sink.
        grid: vision tokens (t, y, x).
        prompts: (P,) the prompt of each sample; equal entries are one prompt.
    """
    frames, height, width = (int(n) for n in grid)
    _, prompt = np.unique(np.asarray(prompts), return_inverse=True)
    owner = np.broadcast_to(prompt.reshape(-1, *[1] * (key.ndim - 1)), key.shape)[with_sink]
    frame, place = np.divmod(np.asarray(key, np.int64)[with_sink], height * width)
    return {
        "frame_p": evenness_p_value(owner, frame, frames),
        "place_p": evenness_p_value(owner, place, height * width),
    }


def evenness_p_value(owner: ArrayLike, cell: ArrayLike, cells: int) -> float:
    """The p-value of the null that no cell is preferred, by permutations within prompts; the same at every call.

    Statistic: the sum over cells of the squared mean over prompts of the share of a prompt's sinks that lie in that
    cell. Every prompt counts alike, however many sinks it has. It is large where prompts prefer the same cells.

    Null: which of the M cells a prompt's sinks lie in does not depend on the cells' names, and prompts are independent.
    So each prompt's shares are permuted over the cells, all its sinks (of all sigmas, layers, heads and samples)
    together: sinks of one prompt may share a cell for any reason, which is no evidence. With one prompt p is 1.

    p = (1 + b) / (1 + n), b of n permutations with a statistic as large or larger.

    Args:
        owner: prompt of each sink.
        cell: of each sink, from 0 to M - 1.
        cells: M.

    Returns:
        p, NaN without a sink.
    """
    names, row = np.unique(np.asarray(owner), return_inverse=True)
    if not len(names):
        return math.nan
    shares = np.zeros((len(names), cells))
    np.add.at(shares, (row, np.asarray(cell)), 1.0)
    shares /= shares.sum(axis=1, keepdims=True)
    rng = np.random.default_rng(_SEED)
    found = _concentration(shares) * (1 - 1e-12)  # equal sums in another order are equal
    exceeding = sum(_concentration(rng.permuted(shares, axis=1)) >= found for _ in range(PERMUTATIONS))
    return float((1 + exceeding) / (1 + PERMUTATIONS))


def _concentration(shares: NDArray) -> float:
    return float(np.square(shares.mean(axis=0)).sum())
