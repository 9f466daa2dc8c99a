"""The test of positions is right under its null, finds a fixed corner, and counts prompts only."""

import math

import numpy as np
import pytest

from trainer.callbacks.positions import evenness_p_value, position_p_values

GRID = (4, 3, 5)
TOKENS = math.prod(GRID)
SHAPE = (12, 4, 2, 3)  # prompts, sigmas, layers, heads


def p_values(key, with_sink=None, prompts=None):
    everywhere = np.ones(key.shape, bool) if with_sink is None else with_sink
    return position_p_values(key, everywhere, GRID, range(len(key)) if prompts is None else prompts)


def one_place_each(rng, count=SHAPE[0]):
    """All sinks of a prompt at one token, drawn for each prompt: as strongly clustered as can be."""
    return np.broadcast_to(rng.integers(TOKENS, size=(count, 1, 1, 1)), (count, *SHAPE[1:]))


@pytest.mark.parametrize("clustered", [True, False])
def test_p_is_uniform_where_positions_are(clustered, monkeypatch):
    monkeypatch.setattr("trainer.callbacks.positions.PERMUTATIONS", 99)
    rng, draws = np.random.default_rng(0), 300
    found = [p_values(one_place_each(rng) if clustered else rng.integers(TOKENS, size=SHAPE)) for _ in range(draws)]
    for name in ("frame_p", "place_p"):
        p = np.array([each[name] for each in found])
        for level in (0.05, 0.2, 0.5):
            share = (p <= level).mean()
            # Never more often than the level (three standard errors); ties of few prompts make it rarer.
            assert share < level + 3 * np.sqrt(level * (1 - level) / draws), (name, level)
        assert (p <= 0.5).mean() > 0.3


def test_a_fixed_corner_is_found():
    assert p_values(np.zeros(SHAPE, int)) == {"frame_p": 0.0005, "place_p": 0.0005}


def test_frames_and_places_are_told_apart():
    rng = np.random.default_rng(1)
    frame_size = GRID[1] * GRID[2]
    first_frame = one_place_each(rng) % frame_size
    assert p_values(first_frame)["frame_p"] == 0.0005 and p_values(first_frame)["place_p"] > 0.02
    corner = one_place_each(rng) // frame_size * frame_size + 7
    assert p_values(corner)["frame_p"] > 0.02 and p_values(corner)["place_p"] == 0.0005


def test_repeats_of_a_prompt_are_no_evidence():
    once = np.full((1, *SHAPE[1:]), 17)
    repeated = np.repeat(once, 30, axis=0)
    assert p_values(once) == p_values(repeated, prompts=[5] * 30) == {"frame_p": 1.0, "place_p": 1.0}
    assert p_values(repeated)["place_p"] == 0.0005  # thirty prompts would be
    key = one_place_each(np.random.default_rng(2), 8)
    assert p_values(np.repeat(key, 3, axis=0), prompts=np.repeat(range(8), 3)) == p_values(key)


def test_a_prompt_counts_once_however_many_sinks_it_has():
    owner, cell = np.repeat(range(6), 2), np.array([0, 3, 0, 1, 3, 2, 4, 5, 0, 6, 1, 3])
    weighted = np.append(owner, [0] * 100), np.append(cell, [0, 3] * 50)
    assert 0.02 < evenness_p_value(owner, cell, 8) < 0.9
    assert evenness_p_value(*weighted, 8) == evenness_p_value(owner, cell, 8)


def test_only_sinks_count():
    key, with_sink = np.zeros(SHAPE, int), np.zeros(SHAPE, bool)
    assert all(math.isnan(p) for p in p_values(key, with_sink).values())
    key[:, :1] = one_place_each(np.random.default_rng(3))[:, :1]
    with_sink[:, 0] = True
    assert p_values(key, with_sink)["place_p"] > 0.02 > p_values(key)["place_p"]


def test_two_prompts_have_the_p_value_of_the_count_of_their_permutations():
    # Both in one of M cells: a permutation puts them together with probability 1 / M.
    assert evenness_p_value([0, 1], [2, 2], 4) == pytest.approx(0.25, abs=0.04)
