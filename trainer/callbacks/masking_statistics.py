"""Figures of robustness to masking, as functions of means over probes. Numpy alone.

Legend: K scopes, R ratios; (...) any leading axes, such as resamples.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

#: The critical ratio is the largest one at which the loss rises by at most this share of the dense loss.
TOLERATED = 0.01
#: Why a critical ratio is left blank.
UNMEASURED = "not measured: the uniform control costs nothing"
#: What `masking_figures` is computed from. Of every probe they are kept as NAME_by_probe.
PER_PROBE = ("energy", "dense_loss", "change", "loss", "uniform_loss")
#: Keeps the logarithm of a distortion of zero finite.
FLOOR = 1e-8


def critical_ratio(
    ratios: Sequence[float] | NDArray, increase: ArrayLike, tolerated: float | NDArray = TOLERATED
) -> NDArray:
    """The largest ratio at which the loss rises by at most `tolerated`, read off the curve, (...).

    The curve is linear between ratios and starts at ratio 0 with no increase. Of several crossings the last one counts.
    NaN counts as an infinite increase.

    Args:
        ratios: R ascending shares.
        increase: (..., R) increase of the loss at each, in the unit of `tolerated`; of relative ones dL(r) / L(0).
        tolerated: largest increase, a share of the dense loss by default.
    """
    rise = np.nan_to_num(np.asarray(increase, dtype=np.float64), nan=np.inf)
    rise = np.concatenate([np.zeros((*rise.shape[:-1], 1)), rise], axis=-1)
    r = np.concatenate([[0.0], np.asarray(ratios, dtype=np.float64)])
    below = rise <= tolerated
    below[..., 0] = True
    last = len(r) - 1 - np.argmax(below[..., ::-1], axis=-1)
    following = np.minimum(last + 1, len(r) - 1)
    at_last, at_following = (np.take_along_axis(rise, index[..., None], axis=-1)[..., 0] for index in (last, following))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        step = np.where(following > last, (tolerated - at_last) / (at_following - at_last), 0.0)
    return r[last] + step * (r[following] - r[last])


def bears_on_attention(uniform_increase: ArrayLike, tolerated: ArrayLike) -> NDArray:
    """Whether a critical ratio says anything: uniform attention costs as much as is tolerated, or more.

    A model that ignores its attention bears any masking. False where the cost is no number.

    Args:
        uniform_increase: increase of the loss with uniform attention.
        tolerated: largest increase that the critical ratio allows, in the same unit.
    """
    return np.asarray(uniform_increase) >= np.asarray(tolerated)


def masking_figures(
    means: Mapping[str, NDArray], ratios: Sequence[float] | NDArray, base_loss: float | None = None
) -> dict[str, NDArray]:
    """D(r), dL(r), robustness AUC, critical ratio, dense loss; of the control dL, and its share of the dense loss.

    Args:
        means: over probes: `energy` and `dense_loss` (...), `change` and `loss` (..., K, R), `uniform_loss` (..., K).
        ratios: the R ratios.
        base_loss: dense loss of stage `base`. With it, `critical_ratio_of_base` is the critical ratio at 1 % of that,
            the same tolerance at all stages.
    """
    energy, dense_loss = (np.asarray(means[name])[..., None, None] for name in ("energy", "dense_loss"))
    with np.errstate(invalid="ignore", divide="ignore"):
        distortion, increase = means["change"] / energy, means["loss"] - dense_loss
        found = {
            "distortion": distortion,
            "loss_increase": increase,
            "auc": np.log10(distortion + FLOOR).mean(axis=-1),
            "critical_ratio": critical_ratio(ratios, increase / dense_loss),
            "dense_loss": np.asarray(means["dense_loss"]),
            "uniform_loss_increase": means["uniform_loss"] - dense_loss[..., 0],
            "uniform_cost": means["uniform_loss"] / dense_loss[..., 0] - 1,
        }
    if base_loss is not None:
        found["critical_ratio_of_base"] = critical_ratio(ratios, increase, TOLERATED * base_loss)
    return found
