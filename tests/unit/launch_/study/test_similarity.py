"""Similarity of maps beside chance: nothing is found where nothing is planted, and intervals are wide enough."""

import numpy as np
import pytest

from launch.study.similarity import between_models, between_prompts, between_seeds, compare, pair_interval
from trainer.callbacks.intervals import FEWEST

PROMPTS, LAYERS, HEADS, SIDE = 8, 3, 4, 12


def drawings(own, common=0.0, seeds=(0,), seed=0):
    """Maps of every (prompt, seed): what all share, what a head keeps, and noise of each map."""
    rng = np.random.default_rng(seed)
    shape = (1, LAYERS, HEADS, SIDE, SIDE)
    every, kept = rng.normal(size=(SIDE, SIDE)), rng.normal(size=shape)
    return {
        (p, s): common * every + own * kept + rng.normal(size=shape) + 3.0 for p in range(PROMPTS) for s in seeds
    }  # fmt: skip


@pytest.mark.parametrize("common", [0.0, 5.0])
def test_independent_maps_are_no_more_alike_than_shuffled_ones(common):
    """Also where all maps share much, so that each correlation by itself is near one."""
    found = between_prompts(drawings(0.0, common))
    mean, low, high = found.overall("same", "layer_others")
    assert low < 0 < high and abs(mean) < 0.02
    assert found.overall("same")[0] == pytest.approx(common**2 / (common**2 + 1), abs=0.05)
    # 96 recognitions of a chance of 1 / 12 each.
    assert found.overall("recognised")[0] == pytest.approx(1 / (LAYERS * HEADS), abs=0.06)


def test_what_heads_keep_is_found():
    found = between_prompts(drawings(1.0))
    mean, low, high = found.overall("same", "others")
    assert low < 0.5 < high and mean == pytest.approx(0.5, abs=0.03) and low > 0.4
    assert found.overall("recognised")[0] == 1.0
    assert found.by_head("same").shape == (LAYERS, HEADS) and found.by_layer("same")[0].shape == (LAYERS,)


def test_prompts_seeds_and_models_are_told_apart():
    maps = drawings(0.0, seeds=(0, 1))
    for prompt in range(PROMPTS):  # the noise of a seed has no part; a prompt has
        maps[prompt, 1] = maps[prompt, 0]
    assert between_seeds(maps).overall("same") == pytest.approx((1, 1, 1))
    assert between_prompts(maps).overall("same")[0] == pytest.approx(0, abs=0.05)
    assert between_prompts(maps, same_seed=False).overall("same")[0] == pytest.approx(0, abs=0.05)
    assert between_models(maps, maps).overall("recognised") == pytest.approx((1, 1, 1))
    assert between_models(maps, drawings(0.0, seeds=(0, 1), seed=1)).overall("same")[0] == pytest.approx(0, abs=0.05)
    for prompt in range(PROMPTS):  # a seed has, a prompt has not
        maps[prompt, 0], maps[prompt, 1] = maps[0, 0], drawings(0.0, seed=2)[0, 0]
    assert between_prompts(maps).overall("same") == pytest.approx((1, 1, 1))
    assert abs(between_prompts(maps, same_seed=False).overall("same")[0]) < 0.1
    assert abs(between_seeds(maps).overall("same")[0]) < 0.1
    one = drawings(0.0)
    assert between_seeds(one) is None and between_prompts(one, same_seed=False) is None


def test_constant_maps_have_no_correlation_and_leave_the_others_theirs():
    maps = np.random.default_rng(0).normal(size=(2, 2, 30)) + 3
    maps[1, 1] = 1.0
    found = compare(maps, maps)
    assert np.isnan(found["same"][1, 1]) and np.isnan(found["recognised"][1, 1]) and np.isnan(found["others"][1, 1])
    assert found["same"].ravel()[:3] == pytest.approx(1) and found["recognised"].ravel()[:3] == pytest.approx(1)
    table = np.corrcoef(maps.reshape(4, -1)[:3])
    assert found["others"].ravel()[:3] == pytest.approx((table.sum(1) - 1) / 2)
    assert found["layer_others"][0] == pytest.approx(table[0, 1]) and np.isnan(found["layer_others"][1]).all()
    equal = compare(np.stack([maps[0, 0]] * 4).reshape(2, 2, 30), np.stack([maps[0, 0]] * 4).reshape(2, 2, 30))
    assert equal["recognised"] == pytest.approx(1 / 4)  # among equals each has its share


def test_an_interval_over_pairs_holds_the_truth_about_as_often_as_it_says():
    """Values of pairs that are sums over their prompts: the mean over pairs varies as twice the mean over prompts."""
    rng, hits, trials = np.random.default_rng(0), 0, 200
    for _ in range(trials):
        prompt = rng.normal(size=PROMPTS)
        values = prompt[:, None] + prompt
        np.fill_diagonal(values, np.nan)
        mean, low, high = pair_interval(values)
        assert float(mean) == pytest.approx(2 * prompt.mean())
        hits += int(low < 0 < high)
    assert 0.89 <= hits / trials <= 1.0
    few = pair_interval(np.ones((FEWEST - 1, FEWEST - 1)))
    assert few[0] == 1 and np.isnan(few[1]) and np.isnan(few[2])
