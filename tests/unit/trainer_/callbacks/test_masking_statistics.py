"""Figures of masking from means: known answers, and that rows do not mix."""

import numpy as np
import pytest

from trainer.callbacks.intervals import bootstrap, paired_bootstrap
from trainer.callbacks.masking_statistics import bears_on_attention, critical_ratio, masking_figures

RATIOS = (0.1, 0.5, 0.9)
CURVES = [
    ([0.0, 0.0, 0.0], 0.9),  # never too much: the largest ratio measured
    ([0.01, 0.01, 0.01], 0.9),  # exactly the limit is allowed
    ([0.0, 0.0, 0.02], 0.7),  # half way between 0.5 and 0.9
    ([0.04, 0.1, 0.2], 0.025),  # a quarter of the way to the first ratio, from no increase at 0
    ([0.02, 0.005, 0.02], 0.5 + 0.4 / 3),  # fails, recovers, fails: the last crossing
    ([-0.1, -0.01, 0.03], 0.7),
    ([0.0, float("nan"), 0.5], 0.1),  # no number is too large, and nothing can be read off beside it
    ([0.0, float("inf"), float("inf")], 0.1),
    ([float("nan")] * 3, 0.0),
]


@pytest.mark.parametrize("rise, expected", CURVES)
def test_critical_ratio(rise, expected):
    assert critical_ratio(RATIOS, rise) == pytest.approx(expected)


def test_critical_ratios_of_many_curves_are_those_of_each():
    found = critical_ratio(RATIOS, np.reshape([rise for rise, _ in CURVES], (3, 3, 3)))
    np.testing.assert_allclose(found.ravel(), [expected for _, expected in CURVES])


@pytest.mark.parametrize(("tolerated", "expected"), [(0.02, 0.9), (0.005, 0.6), (0.0, 0.5), (float("nan"), np.nan)])
def test_the_tolerance_can_be_another(tolerated, expected):
    assert critical_ratio(RATIOS, [0.0, 0.0, 0.02], tolerated) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("uniform", "tolerated", "expected"),
    [(0.02, 0.01, True), (0.01, 0.01, True), (0.009, 0.01, False), (-0.1, 0.01, False), (np.inf, 0.01, True),
     (np.nan, 0.01, False), (0.02, np.nan, False)],
)  # fmt: skip
def test_a_critical_ratio_says_something_only_where_uniform_attention_costs_as_much(uniform, tolerated, expected):
    assert bears_on_attention(uniform, tolerated) == expected


def test_at_the_bases_tolerance_a_worse_model_bears_no_more():
    """The same increase of twice the loss: r* of the own loss grows, that of the base's does not."""
    increase = np.array([[0.001, 0.005, 0.02]])

    def figures(dense_loss):
        return masking_figures(
            {"energy": 1.0, "dense_loss": dense_loss, "change": increase, "loss": dense_loss + increase,
             "uniform_loss": np.array([1.0])}, RATIOS, base_loss=0.5,
        )  # fmt: skip

    good, bad = figures(0.5), figures(1.0)
    assert good["critical_ratio"] == pytest.approx(0.5) == good["critical_ratio_of_base"]
    assert bad["critical_ratio"] == pytest.approx(0.5 + 0.4 / 3) and bad["critical_ratio_of_base"] == pytest.approx(0.5)


def means(prompts=8):
    """Every probe of prompt p is scaled by p + 1: quotients do not change, differences do."""
    scale = np.arange(1.0, prompts + 1)[:, None] * np.ones((1, 2))
    curve = np.array([[0.0, 0.005, 0.03], [0.02, 0.02, 0.02]])
    return {
        "energy": 2 * scale, "dense_loss": 0.5 * scale, "change": scale[..., None, None] * curve,
        "loss": scale[..., None, None] * 0.5 * (1 + curve), "uniform_loss": scale[..., None] * np.array([0.6, 0.5]),
    }  # fmt: skip


def test_figures_and_intervals_of_proportional_probes():
    tables = means()

    def statistic(found):
        return masking_figures(found, RATIOS)

    whole = statistic({name: table.mean(axis=(0, 1)) for name, table in tables.items()})
    assert whole["critical_ratio"] == pytest.approx([0.5 + 0.4 * 0.2, 0.05])
    assert whole["uniform_loss_increase"] == pytest.approx([0.1 * 4.5, 0.0])
    assert whole["distortion"][0] == pytest.approx([0.0, 0.0025, 0.015])
    assert whole["auc"] == pytest.approx(np.log10(whole["distortion"] + 1e-8).mean(axis=1))
    found = bootstrap(statistic, tables, range(8))
    for name in ("distortion", "critical_ratio", "auc"):  # quotients: no prompt differs from another
        np.testing.assert_allclose(found[name], [whole[name]] * 2, atol=1e-12)
    low, high = found["loss_increase"]
    assert (low <= whole["loss_increase"]).all() and (high >= whole["loss_increase"]).all() and low[0, 2] < high[0, 2]
    worse = {**tables, "loss": tables["loss"] + 0.01 * tables["dense_loss"][..., None, None]}
    low, high = paired_bootstrap(statistic, tables, worse, range(8))["critical_ratio"]
    # Curves begin at 0.01: the first is at 1 % at once up to ratio 0.1, the second never.
    np.testing.assert_allclose([low, high], [[0.1 - 0.58, 0.1 * 0.01 / 0.03 - 0.05]] * 2, atol=1e-9)
