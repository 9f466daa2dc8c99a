"""Intervals over prompts: closed forms, an independent bootstrap, and how often they hold the truth."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.callbacks.intervals import FEWEST, bootstrap, excludes_zero, paired_bootstrap, tail

COUNTS = st.integers(FEWEST, 20)
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def mean(means):
    return {"mean": means["x"]}


def interval(x, prompts=None):
    found = bootstrap(mean, {"x": np.asarray(x)}, range(len(x)) if prompts is None else prompts)
    return found and found["mean"]


@pytest.mark.parametrize(
    ("prompts", "student"), [(6, 2.570582), (8, 2.364624), (14, 2.160369), (41, 2.021075), (10**6, 1.959966)]
)
def test_the_share_beyond_the_ends_is_that_of_students_t(prompts, student):
    expanded = student * np.sqrt(prompts / (prompts - 1))
    assert -NormalDist().inv_cdf(tail(prompts)) == pytest.approx(expanded, abs=6e-4)


@given(SEEDS, COUNTS)
def test_with_one_probe_of_each_prompt_it_is_the_ordinary_bootstrap(seed, count):
    x = draw(seed, count, 1)
    chosen = np.random.default_rng(1).integers(count, size=(20_000, count))  # draws of its own, one by one
    ordinary = np.quantile(x[chosen, 0].mean(axis=1), [tail(count), 1 - tail(count)])
    # Two draws of a quantile far out differ by a few percent of the spread.
    assert np.abs(interval(x) - ordinary).max() < 0.35 * x.std() / np.sqrt(count)


@given(SEEDS, COUNTS, st.integers(2, 5))
def test_repeats_of_a_prompt_are_no_new_prompts(seed, count, times):
    x = draw(seed, count, 3)
    once = interval(x)
    np.testing.assert_allclose(interval(np.repeat(x, times, axis=0), np.repeat(range(count), times)), once)
    np.testing.assert_allclose(interval(np.repeat(x, times, axis=1)), once)  # nor are more sigmas


@given(SEEDS, COUNTS)
def test_the_names_and_order_of_prompts_do_not_matter_when_each_is_alone(seed, count):
    x = draw(seed, count, 2)
    names = [f"prompt {i}" for i in np.argsort(np.argsort(x[:, 0]))]
    order = np.argsort(names)
    np.testing.assert_allclose(interval(x, names), interval(x[order], np.array(names)[order]))


@pytest.mark.parametrize("count", [FEWEST, 8, 14])
def test_the_interval_of_a_known_mean_holds_it_in_95_of_100_draws(count):
    # Prompts differ from each other far more than the probes of one prompt.
    draws = 400
    truth, held = 1.5, 0
    for seed in range(draws):
        x = truth + draw(seed, count, 1) + 0.3 * draw(10_000 + seed, count, 4)
        low, high = interval(x)
        held += low <= truth <= high
    assert held / draws == pytest.approx(0.95, abs=0.035)  # three standard errors


def test_a_paired_difference_is_far_surer_than_two_intervals():
    prompts = 5.0 * draw(0, 10, 1)  # the same in both
    before, after = ({"x": prompts + shift + 0.1 * draw(seed, 10, 4)} for seed, shift in ((1, 0.0), (2, 0.3)))
    low, high = paired_bootstrap(mean, before, after, range(10))["mean"]
    assert 0 < low < 0.3 < high + 0.1 and high - low < 0.3
    alone = [bootstrap(mean, tables, range(10))["mean"] for tables in (before, after)]
    assert alone[0][1] > alone[1][0]


@given(SEEDS, COUNTS)
def test_the_interval_between_a_stage_and_itself_is_zero(seed, count):
    tables = {"x": draw(seed, count, 2, 3)}
    low, high = paired_bootstrap(mean, tables, {"x": tables["x"].copy()}, range(count))["mean"]
    assert not low.any() and not high.any() and low.shape == (3,)
    assert not any(excludes_zero(pair) for pair in zip(low, high, strict=True))


@given(SEEDS, COUNTS)
def test_swapped_stages_swap_the_ends(seed, count):
    before, after = {"x": draw(seed, count, 2)}, {"x": draw(seed + 1, count, 2)}
    low, high = paired_bootstrap(mean, before, after, range(count))["mean"]
    np.testing.assert_allclose(paired_bootstrap(mean, after, before, range(count))["mean"], (-high, -low))


@pytest.mark.parametrize("prompts", [[0], [3] * 20, range(FEWEST - 1)])
def test_few_prompts_give_no_interval(prompts):
    tables = {"x": draw(0, len(prompts), 4)}
    assert bootstrap(mean, tables, prompts) is None
    assert paired_bootstrap(mean, tables, tables, prompts) is None


@pytest.mark.parametrize(
    ("ends", "expected"),
    [((0.1, 0.2), True), ((-0.2, -0.1), True), ((-0.1, 0.1), False), ((0.0, 0.2), False), ((0.0, 0.0), False),
     ((np.nan, np.nan), False), ((0.1, np.inf), False), (None, False)],
)  # fmt: skip
def test_an_interval_excludes_zero_only_on_one_side_of_it(ends, expected):
    assert excludes_zero(ends) is expected
