"""The order of visits: complete, different each epoch, the same for any number of ranks, resumable at any batch."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.order import ResumableBatchSampler, epoch_order, evaluation_indices

sizes_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(sizes_strategy, st.integers(0, 5), st.integers(1, 3), st.integers(1, 5))
def test_each_pass_visits_every_sample_once(sizes, epoch, passes, window):
    order = epoch_order(3, epoch, sizes, passes=passes, window=window)
    total = sum(sizes)
    assert len(order) == passes * total
    for number in range(passes):
        part = order[number * total : (number + 1) * total]
        assert sorted(part) == list(range(number * total, (number + 1) * total))


def test_epochs_passes_and_seeds_differ_and_repeat_exactly():
    sizes = [8] * 8
    order = epoch_order(0, 0, sizes, passes=2)
    assert np.array_equal(order, epoch_order(0, 0, sizes, passes=2))
    assert not np.array_equal(order[:64], order[64:] - 64)
    assert not np.array_equal(order, epoch_order(0, 1, sizes, passes=2))
    assert not np.array_equal(order, epoch_order(1, 0, sizes, passes=2))
    assert np.array_equal(order[:64], epoch_order(0, 0, sizes))


def test_shuffling_stays_inside_windows_of_shards():
    shard_of = epoch_order(0, 0, [10] * 12, window=3) // 10
    windows = [set(shard_of[start : start + 30]) for start in range(0, 120, 30)]
    assert all(len(window) == 3 for window in windows)
    assert set().union(*windows) == set(range(12))
    assert len(set(shard_of[:10])) > 1  # and shards of a window are mixed


@settings(max_examples=60, deadline=None)
@given(st.integers(12, 60), st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)]), st.integers(0, 5))
def test_global_batches_are_the_same_on_any_number_of_ranks_and_after_any_resume(samples, layout, start):
    world, size = layout
    order = np.random.default_rng(0).permutation(samples)
    ranks = [ResumableBatchSampler(order, size, rank, world, start) for rank in range(world)]
    got = [list(chain(*parts)) for parts in zip(*ranks, strict=True)]  # strict: ranks have equally many
    whole = [order[g * 12 : (g + 1) * 12].tolist() for g in range(samples // 12)]
    assert got == whole[start:]
    assert all(len(rank) == len(whole) for rank in ranks)  # the epoch's, whatever is consumed


def test_too_few_samples_or_no_such_rank():
    with pytest.raises(ValueError, match="at least one full batch"):
        ResumableBatchSampler(np.arange(7), 4, 0, 2)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ResumableBatchSampler(np.arange(7), 2, 2, 2)


@pytest.mark.parametrize("count, world", [(16, 1), (16, 4), (5, 2), (3, 8)])
def test_evaluation_covers_everything_equally_often_per_rank(count, world):
    shares = [evaluation_indices(count, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for index in share} == set(range(count))
    assert sum(map(len, shares)) < count + world
