"""Whether latents are normalised as the index says.

Legend: C latent channels.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

#: A channel of normalised latents has about mean 0 and standard deviation 1. Largest mean, range of deviations.
_MEAN, _STD = 0.5, (0.6, 1.6)


def is_off(mean: float, std: float) -> bool:
    """Whether a channel is far from mean 0 and standard deviation 1."""
    return not (abs(mean) <= _MEAN and _STD[0] <= std <= _STD[1])


def normalisation_doubts(
    mean: NDArray[np.float64], std: NDArray[np.float64], vae_mean: Sequence[float], vae_std: Sequence[float]
) -> list[str]:
    """Messages on what seems wrong with the normalisation of latents.

    Args:
        mean: (C,) of the normalised latents.
        std: (C,) of the normalised latents.
        vae_mean: (C,) used for normalising them.
        vae_std: (C,) used for normalising them.
    """
    doubts = []
    far = [c for c in range(len(mean)) if is_off(mean[c], std[c])]
    if far:
        doubts.append(
            f"channels {far} are far from mean 0 and deviation 1; expected raw latents of the base whose latents_mean "
            "and latents_std the index holds."
        )
    # Latents that were stored normalised are normalised a second time: their deviations follow 1 / latents_std.
    log_vae_std = np.log(np.asarray(vae_std, dtype=np.float64))
    if log_vae_std.std() > 0.05 and np.log(std.clip(1e-6)).std() > 0:
        slope, correlation = _fit_line(log_vae_std, np.log(std.clip(1e-6)))
        if correlation < -0.95 and -1.5 < slope < -0.67:
            doubts.append(
                f"deviations follow 1 / latents_std (correlation {correlation:.3f}): the latents seem to have been "
                "stored normalised and are normalised twice; expected raw ones."
            )
    return doubts


def _fit_line(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of y over x, and their correlation."""
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x @ x)), float(x @ y / np.sqrt((x @ x) * (y @ y)))
