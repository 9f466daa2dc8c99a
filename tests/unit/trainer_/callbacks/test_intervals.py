"""Intervals over prompts: closed forms, an independent bootstrap, and how often they hold the truth."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.callbacks.intervals import (
    FEWEST,
    bootstrap,
    excludes_zero,
    paired_bootstrap,
    run_difference,
    share_difference,
    tail,
    wilson_interval,
)

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


def test_a_difference_over_runs_is_students():
    # Difference 3; variances 1 and 1 (two runs less one each), so t of two degrees of freedom, 4.303, times 1.
    low, high = run_difference([0.0, 2**0.5], [3.0, 3.0 + 2**0.5])
    assert (low, high) == pytest.approx((3 - 4.303, 3 + 4.303), abs=1e-3)
    # Three against one run: no interval, for the one says nothing of its spread.
    assert run_difference([1.0, 2.0, 3.0], [4.0]) is None
    assert run_difference([1.0, np.nan], [4.0, 5.0]) is None


@pytest.mark.parametrize("runs", [(2, 2), (3, 2), (4, 4)])
def test_a_difference_over_runs_holds_the_truth_as_often_as_it_says(runs):
    rng = np.random.default_rng(3)
    sides = [rng.normal(size=(3000, count)) + mean for count, mean in zip(runs, (0.0, 0.7), strict=True)]
    intervals = [run_difference(*pair) for pair in zip(*sides, strict=True)]
    held = np.mean([low <= 0.7 <= high for low, high in intervals])
    assert abs(held - 0.95) < 4 * np.sqrt(0.95 * 0.05 / 3000)


@given(SEEDS, COUNTS)
def test_with_one_probe_of_each_prompt_it_is_the_ordinary_bootstrap(seed, count):
    x = draw(seed, count, 1)
    chosen = np.random.default_rng(1).integers(count, size=(20_000, count))  # draws of its own, one by one
    ordinary = x[chosen, 0].mean(axis=1)
    low, high = interval(x)
    expected = tail(count)
    for beyond in ((ordinary < low).mean(), (ordinary > high).mean()):  # up to the error of two samples
        assert abs(beyond - expected) < 5 * np.sqrt(expected * (1 / 4000 + 1 / 20_000)) + 1e-3


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


@pytest.mark.parametrize(
    "successes, trials, low, high",
    # At the ends z^2 / (n + z^2), in the middle 1/2 -+ z / (2 sqrt(n + z^2)).
    [(0, 10, 0.0, 0.277533), (5, 10, 0.236593, 0.763407), (10, 10, 0.722467, 1.0)],
)
def test_wilson_interval(successes, trials, low, high):
    got = wilson_interval(np.array([successes]), trials)
    assert got[0][0] == pytest.approx(low, abs=2e-6) and got[1][0] == pytest.approx(high, abs=2e-6)


def test_wilson_ends_are_where_the_score_test_turns():
    # The definition itself: at either end p, |share - p| is 1.96 standard errors under p.
    low, high = wilson_interval(np.arange(1, 14), 14)
    for end in (low, high):
        score = (np.arange(1, 14) / 14 - end) / np.sqrt(end * (1 - end) / 14)
        np.testing.assert_allclose(np.abs(score), 1.959964, rtol=1e-6)


def test_a_difference_of_shares_is_that_of_its_formula():
    before, after = paired(both=22, only_before=2, only_after=14, neither=12)
    low, high = share_difference(before, after, range(50))
    (b_low, b_high), (a_low, a_high) = wilson_interval(24.0, 50), wilson_interval(36.0, 50)
    phi = (22 * 12 - 2 * 14 - 50 / 2) / np.sqrt(24 * 26 * 36 * 14)
    lower = [0.72 - a_low, b_high - 0.48]
    upper = [a_high - 0.72, 0.48 - b_low]
    for end, (one, other), sign in ((low, lower, -1), (high, upper, 1)):
        assert end == pytest.approx(0.24 + sign * np.sqrt(one**2 + other**2 - 2 * phi * one * other))
    assert 0 < low < 0.24 < high


def paired(both, only_before, only_after, neither):
    counts = (both, only_before, only_after, neither)
    return np.repeat([1.0, 1.0, 0.0, 0.0], counts), np.repeat([1.0, 0.0, 1.0, 0.0], counts)


@given(SEEDS, COUNTS)
def test_a_share_does_not_differ_from_itself(seed, count):
    share = np.random.default_rng(seed).integers(0, 5, count) / 4
    assert not excludes_zero(share_difference(share, share, range(count)))


def test_shares_that_agree_in_all_prompts_still_have_an_interval():
    low, high = share_difference(np.ones(14), np.zeros(14), range(14))
    assert low == -1 and -0.8 < high < -0.6  # Wilson's ends, 0.22, squared and added


@given(SEEDS, COUNTS, st.integers(2, 4))
def test_repeats_of_a_prompt_make_no_share_surer(seed, count, times):
    rng = np.random.default_rng(seed)
    before, after = rng.integers(0, 2, (2, count)).astype(float)
    once = share_difference(before, after, range(count))
    samples = np.append([times], [1] * (count - 1))  # of the first prompt only
    again = share_difference(*(np.repeat(x, samples) for x in (before, after)), np.repeat(range(count), samples))
    np.testing.assert_allclose(once, again)
    assert share_difference(before, after, np.arange(count) % (FEWEST - 1)) is None


@pytest.mark.parametrize(("old", "new"), [(0.9, 0.1), (0.5, 0.5), (1.0, 0.2), (0.95, 0.95)])
def test_the_interval_of_a_difference_of_shares_holds_it_in_95_of_100_draws(old, new):
    rng, held, draws = np.random.default_rng(0), 0, 1000
    for _ in range(draws):
        before, after = rng.random(14) < old, rng.random(14) < new
        low, high = share_difference(before, after, range(14))
        held += low <= new - old <= high
    assert held / draws > 0.93
