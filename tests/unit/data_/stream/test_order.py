"""The order of visits: complete, different each epoch, the same for any number of ranks, resumable at any batch."""

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.stream.order import (
    BatchGroup,
    ResumableBatchSampler,
    epoch_order,
    evaluation_batches,
    global_batches,
    rank_size,
)

sizes_strategy = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def make_groups(layout: list[tuple[int, int]]) -> list[BatchGroup]:
    """Groups of shards that lie between one another: (group, samples) of each shard in turn."""
    starts = np.cumsum([0, *(size for _, size in layout)])
    names = sorted({group for group, _ in layout})
    return [
        BatchGroup(
            str(name),
            np.array([start for start, (group, _) in zip(starts, layout, strict=False) if group == name]),
            np.array([size for group, size in layout if group == name]),
        )
        for name in names
    ]


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
    assert not np.array_equal(order, epoch_order(0, 0, sizes, passes=2, group=1))
    assert np.array_equal(order[:64], epoch_order(0, 0, sizes))


def test_the_order_is_that_of_earlier_versions():
    """Runs in the middle of an epoch go on: what is drawn may not change."""
    assert epoch_order(5, 2, [3, 2, 4], passes=2, window=2).tolist() == (
        [0, 3, 4, 1, 2, 5, 7, 6, 8, 17, 12, 15, 14, 13, 16, 9, 10, 11]
    )


def test_shuffling_stays_inside_windows_of_shards():
    shard_of = epoch_order(0, 0, [10] * 12, window=3) // 10
    windows = [set(shard_of[start : start + 30]) for start in range(0, 120, 30)]
    assert all(len(window) == 3 for window in windows)
    assert set().union(*windows) == set(range(12))
    assert len(set(shard_of[:10])) > 1  # and shards of a window are mixed


layouts = st.lists(st.tuples(st.integers(0, 3), st.integers(1, 30)), min_size=1, max_size=10)


@settings(max_examples=150, deadline=None)
@given(layouts, st.integers(1, 16), st.integers(1, 3), st.integers(0, 3))
def test_batches_are_of_one_group_complete_but_for_its_ragged_end(layout, size, passes, epoch):
    groups = make_groups(layout)
    total = sum(len(group) for group in groups)
    group_of = np.concatenate([np.full(size, group) for group, size in layout])
    if not any(len(group) * passes >= size for group in groups):
        with pytest.raises(ValueError, match="at least one full batch of one bucket"):
            global_batches(0, epoch, groups, size, passes=passes)
        return
    batches = global_batches(0, epoch, groups, size, passes=passes)
    assert all(len(set(group_of[row % total])) == 1 for row in batches)
    seen = Counter(batches.flatten().tolist())
    assert set(seen.values()) == {1} and set(seen) <= set(range(passes * total))
    rows = Counter(str(group_of[row[0] % total]) for row in batches)
    assert {g.name: rows[g.name] for g in groups} == {g.name: len(g) * passes // size for g in groups}
    for group in groups:  # a pass is over before the next begins
        mine = np.concatenate([[]] + [row // total for row in batches if str(group_of[row[0] % total]) == group.name])
        assert (np.diff(mine) >= 0).all()


def test_what_is_left_out_and_the_turn_of_the_groups_change_with_the_epoch():
    groups = make_groups([(0, 13), (1, 13), (0, 10), (1, 5)])
    epochs = [global_batches(0, epoch, groups, 4) for epoch in range(4)]
    assert len({frozenset(range(41)) - frozenset(e.flatten().tolist()) for e in epochs}) > 1
    first = np.concatenate([np.full(13, 0), np.full(13, 1), np.full(10, 0), np.full(5, 1)])
    turns = [first[e[:, 0]] for e in epochs]
    assert len({tuple(turn) for turn in turns}) > 1
    assert all(np.diff(turn).astype(bool).sum() > 0 for turn in turns)


def test_groups_take_turns_all_through_the_epoch():
    """The share of a group in any stretch of the epoch is near its share of the samples."""
    groups = make_groups([(0, 3000), (1, 1000)])
    rows = global_batches(0, 0, groups, 4)[:, 0] >= 3000
    for part in np.array_split(rows, 4):
        assert abs(part.mean() - 0.25) < 0.08


@settings(max_examples=100, deadline=None)
@given(layouts, st.sampled_from([(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)]), st.integers(0, 5))
def test_global_batches_are_the_same_on_any_number_of_ranks_and_after_any_resume(layout, ranks, start):
    world, size = ranks
    whole = global_batches(1, 0, make_groups([*layout, (9, 12)]), 12)
    shares = [ResumableBatchSampler(whole, rank, world, start) for rank in range(world)]
    got = [list(chain(*parts)) for parts in zip(*shares, strict=True)]  # strict: ranks have equally many
    assert got == whole[start:].tolist()
    assert all(share.batch_size == size and len(share) == len(whole) for share in shares)


def test_ranks_that_do_not_divide_a_batch_are_refused_with_sizes_that_would_do():
    with pytest.raises(ValueError, match=r"got global_batch_size 10 on 4 ranks, expected .*: 8 or 12"):
        ResumableBatchSampler(np.zeros((2, 10), dtype=np.int64), 0, 4)
    with pytest.raises(ValueError, match=r"multiple of the ranks: 8\."):
        rank_size(3, 8)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        ResumableBatchSampler(np.zeros((2, 4), dtype=np.int64), 2, 2)


@settings(max_examples=100, deadline=None)
@given(layouts, st.integers(1, 8), st.integers(1, 5))
def test_evaluation_covers_everything_once_in_equal_batches_per_rank(layout, world, size):
    groups = make_groups(layout)
    total = sum(len(group) for group in groups)
    group_of = np.concatenate([np.full(size, group) for group, size in layout])
    shares = [evaluation_batches(groups, size, rank, world) for rank in range(world)]
    for parts in zip(*shares, strict=True):
        assert len({len(part) for part in parts}) == 1 and 0 < len(parts[0]) <= size
        assert len({group_of[visit % total] for part in parts for visit in part}) == 1
    visits = [visit for share in shares for batch in share for visit in batch]
    assert sorted(visit for visit in visits if visit < total) == list(range(total))  # each counts once
    assert len(visits) < total + world * len(groups)
