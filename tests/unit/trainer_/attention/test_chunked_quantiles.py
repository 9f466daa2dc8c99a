"""Pooled quantiles: bit-exact order statistics, ties, chunks, and agreement with the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import attention_draws as draws
from trainer.attention import chunked_quantiles, pooled_quantiles, radix_select, row_quantiles
from trainer.attention import dense as reference
from trainer.attention.float32 import float32_matmul
from trainer.attention.inputs import threshold_ranks

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)


def draw_heads(seed: int, batch: int, heads: int, tokens: int, width: int, scale: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3))
    return q * scale, k, v


heads_strategy = st.tuples(
    st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 23), st.sampled_from([2, 8]),
    st.sampled_from([0.0, 0.3, 1.0, 8.0, 60.0]),
)  # fmt: skip


def all_weights(q, k, chunk):
    return draws.chunked_weights(q, k, chunk=chunk)


@settings(max_examples=60, deadline=None)
@given(heads_strategy, st.integers(1, 25))
def test_is_the_exact_order_statistic_of_the_weights(drawn, chunk):
    q, k, _ = draw_heads(*drawn)
    weights = all_weights(q, k, chunk)
    total = weights[0, 0].numel()
    ordered = np.sort(weights.flatten(2).numpy(), axis=-1)
    got = pooled_quantiles(q, k, RATIOS, chunk=chunk)
    expected = torch.from_numpy(ordered[..., threshold_ranks(RATIOS, total)])
    assert torch.equal(got, expected)
    strictly_below = (weights[..., None] < got[:, :, None, None]).sum(dim=(2, 3))
    assert (strictly_below <= torch.tensor(RATIOS) * total + 1e-6 * total).all()


@settings(max_examples=30, deadline=None)
@given(heads_strategy)
def test_agrees_with_the_float64_reference(drawn):
    q, k, _ = draw_heads(*drawn)
    truth = reference.pooled_quantiles(reference.attention_weights(q, k), RATIOS)
    torch.testing.assert_close(pooled_quantiles(q, k, RATIOS).double(), truth, rtol=1e-4, atol=1e-37)


def test_chunks_and_one_pass_agree_bitwise_where_the_weights_do():
    q, k, _ = draw_heads(3, 2, 3, 50, 8, 2.0)
    dense = pooled_quantiles(q, k, RATIOS)
    for chunk in (1, 7, 49):
        torch.testing.assert_close(pooled_quantiles(q, k, RATIOS, chunk=chunk), dense, rtol=1e-5, atol=0)


def test_uniform_attention_ties_everywhere_and_nothing_lies_below():
    q, k = torch.zeros(1, 2, 10, 4), torch.randn(1, 2, 10, 4)
    for chunk in (None, 3):
        thresholds = pooled_quantiles(q, k, RATIOS, chunk=chunk)
        assert torch.equal(thresholds, torch.full((1, 2, len(RATIOS)), 1 / 10))


@pytest.mark.parametrize(
    "ratio, total, expected",
    [(0.0, 10, 0), (0.1, 10, 1), (0.3, 10, 3), (0.99, 10, 9), (1.0, 10, 9), (0.29, 100, 29)],  # 0.29 * 100 < 29
)
def test_rank_reads_the_ratio_as_its_decimal(ratio, total, expected):
    assert threshold_ranks([ratio], total) == [expected]


def test_many_ratios_that_share_leading_bits():
    q, k, _ = draw_heads(1, 1, 2, 40, 8, 0.01)  # all weights within a few per cent of 1/40
    ratios = tuple(i / 50 for i in range(51))
    weights = all_weights(q, k, 16)
    expected = np.sort(weights.flatten(2).numpy(), axis=-1)[..., threshold_ranks(ratios, 1600)]
    assert torch.equal(pooled_quantiles(q, k, ratios, chunk=16), torch.from_numpy(expected))


def test_bfloat16_inputs_are_computed_in_float32_also_under_autocast():
    q, k, _ = (t.bfloat16() for t in draw_heads(5, 1, 2, 20, 8, 1.0))
    plain = pooled_quantiles(q, k, RATIOS, chunk=6)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, pooled_quantiles(q.float(), k.float(), RATIOS, chunk=6))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, pooled_quantiles(q, k, RATIOS, chunk=6))


def test_matmul_leaves_the_process_wide_precision_alone():
    a = torch.randn(4, 4)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with pytest.raises(RuntimeError):
            float32_matmul(a, torch.randn(3, 4))
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)


def test_faults_are_named():
    q, k, _ = draw_heads(0, 1, 1, 4, 2, 1.0)
    with pytest.raises(ValueError, match="got ratios"):
        pooled_quantiles(q, k, (0.5, 1.5))
    with pytest.raises(ValueError, match="got q of shape"):
        pooled_quantiles(q[0], k[0], (0.5,))
    with pytest.raises(ValueError, match="got q of shape"):
        pooled_quantiles(q[:, :, :0], k, (0.5,))
    with pytest.raises(ValueError, match="got chunk 0"):
        pooled_quantiles(q, k, (0.5,), chunk=0)


# -- drawn distributions, parts of the keys, lengths, rows -----------------------------------------------------------


def within(got, truth):
    """Thresholds agree but for float32 rounding; below its range they are 0."""
    torch.testing.assert_close(got.double(), truth, rtol=5e-4, atol=1e-36)


@settings(max_examples=80, deadline=None)
@given(draws.heads_strategy, st.integers(1, 50), st.integers(1, 45), st.booleans())
def test_pools_leading_keys_and_valid_tokens_only(drawn, chunk, num_keys, padded):
    q, k, _ = draws.draw_heads(*drawn)
    num_keys = min(num_keys, k.shape[2])
    lengths = draws.lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    got = pooled_quantiles(q, k, RATIOS, num_keys=num_keys, lengths=lengths, chunk=chunk)
    every = draws.chunked_weights(q, k, chunk=chunk, lengths=lengths)
    for sample, length in enumerate(lengths or [q.shape[2]] * q.shape[0]):
        pool = np.sort(every[sample, :, :length, : min(length, num_keys)].flatten(1).numpy(), axis=-1)
        assert torch.equal(got[sample], torch.from_numpy(pool[:, threshold_ranks(RATIOS, pool.shape[1])]))
    weights = reference.attention_weights(q, k, lengths)
    within(got, reference.pooled_quantiles(weights, RATIOS, num_keys=num_keys, lengths=lengths))


@settings(max_examples=60, deadline=None)
@given(draws.heads_strategy, st.integers(1, 50), st.integers(1, 45), st.booleans())
def test_row_quantiles_are_each_rows_order_statistic(drawn, chunk, num_keys, padded):
    q, k, _ = draws.draw_heads(*drawn)
    num_keys = min(num_keys, k.shape[2])
    lengths = draws.lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    got = row_quantiles(q, k, RATIOS, num_keys=num_keys, lengths=lengths, chunk=chunk)
    every = draws.chunked_weights(q, k, chunk=chunk, lengths=lengths)
    for sample, length in enumerate(lengths or [q.shape[2]] * q.shape[0]):
        total = min(length, num_keys)
        ordered = np.sort(every[sample, :, :length, :total].numpy(), axis=-1)
        assert torch.equal(got[sample, :, :length], torch.from_numpy(ordered[..., threshold_ranks(RATIOS, total)]))
        assert not got[sample, :, length:].any()
    weights = reference.attention_weights(q, k, lengths)
    within(got, reference.row_quantiles(weights, RATIOS, num_keys=num_keys, lengths=lengths))


@pytest.fixture
def passes(monkeypatch):
    """One entry for every pass over the weights."""
    found, counted = [], chunked_quantiles.logit_and_weight_chunks
    monkeypatch.setattr(
        chunked_quantiles, "logit_and_weight_chunks", lambda *a, **o: found.append(1) or counted(*a, **o)
    )
    return found


@pytest.mark.parametrize("counts, expected_passes", [(1, 3), (2**23, 2)])
@pytest.mark.parametrize("kind", draws.KINDS)
def test_two_passes_and_three_find_the_same(kind, counts, expected_passes, passes, monkeypatch):
    monkeypatch.setattr(radix_select, "_MAX_COUNTS", counts)  # 1: the low bits are read in two passes
    q, k, _ = draws.draw_heads(kind, 5, 2, 2, 33, 16)
    ratios = tuple(i / 20 for i in range(21))
    expected = np.sort(all_weights(q, k, 10).flatten(2).numpy(), axis=-1)[..., threshold_ranks(ratios, 33 * 33)]
    assert torch.equal(pooled_quantiles(q, k, ratios, chunk=10), torch.from_numpy(expected))
    assert len(passes) == expected_passes


@pytest.mark.parametrize("ratios", [(0.5,), (0.05, 0.5, 0.95)])
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0])
def test_a_bin_may_hold_most_weights_of_a_long_chunk(scale, ratios):
    q, k, _ = draws.draw_heads("random", 4, 1, 2, 300, 16)
    expected = np.sort(all_weights(q * scale, k, 200).flatten(2).numpy(), axis=-1)[
        ..., threshold_ranks(ratios, 300 * 300)
    ]
    assert torch.equal(pooled_quantiles(q * scale, k, ratios, chunk=200), torch.from_numpy(expected))


@settings(max_examples=60, deadline=None)
@given(draws.heads_strategy, st.integers(1, 44), st.sampled_from([1e-4, 0.003, 0.05, 1.0]), st.booleans())
def test_rank_error_is_kept(drawn, chunk, rank_error, padded):
    q, k, _ = draws.draw_heads(*drawn)
    lengths = draws.lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    got = pooled_quantiles(q, k, RATIOS, chunk=chunk, rank_error=rank_error, lengths=lengths)
    every = draws.chunked_weights(q, k, chunk=chunk, lengths=lengths)
    for sample, length in enumerate(lengths or [q.shape[2]] * q.shape[0]):
        pool = every[sample, :, :length, :length].flatten(1)
        total = pool.shape[1]
        for place, rank in enumerate(threshold_ranks(RATIOS, total)):
            threshold = got[sample, :, place, None]
            below, up_to = (pool < threshold).sum(dim=1), (pool <= threshold).sum(dim=1)
            assert (below <= rank).all()
            assert (up_to >= rank - rank_error * total).all()


def test_a_rank_error_saves_the_second_pass(passes):
    q, k, _ = draws.draw_heads("random", 1, 1, 1, 200, 16)
    exact = pooled_quantiles(q, k, RATIOS, chunk=50)
    assert len(passes) == 2
    coarse = pooled_quantiles(q, k, RATIOS, chunk=50, rank_error=0.05)
    assert len(passes) == 3
    assert (coarse <= exact).all() and (coarse >= exact * (1 - 2**-8)).all()


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_back_ends_agree_and_dense_is_in_float64(backend):
    q, k, _ = draws.draw_heads("sharp", 2, 2, 2, 29, 64)
    weights = reference.attention_weights(q, k, [29, 13])
    got = pooled_quantiles(q, k, RATIOS, num_keys=20, lengths=[29, 13], backend=backend)
    within(got, reference.pooled_quantiles(weights, RATIOS, num_keys=20, lengths=[29, 13]))
    rows = row_quantiles(q, k, RATIOS, num_keys=20, backend=backend)
    within(rows, reference.row_quantiles(reference.attention_weights(q, k), RATIOS, num_keys=20))
    assert got.dtype == rows.dtype == (torch.float64 if backend == "dense" else torch.float32)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])  # inf - inf is a NaN with a sign on x86
def test_weights_that_are_no_number_do_not_stop_the_measurement(broken):
    q, k, _ = draws.draw_heads("random", 2, 1, 2, 30, 16)
    q[0, 0, 3] = broken
    got = pooled_quantiles(q, k, (0.1, 1.0), chunk=8)
    assert got[0, 0, 1].isnan() and torch.isfinite(got[0, 1]).all()


def test_no_ratios_give_no_thresholds():
    q, k, _ = draws.draw_heads("random", 2, 1, 2, 9, 16)
    assert all(pooled_quantiles(q, k, (), chunk=chunk).shape == (1, 2, 0) for chunk in (None, 4))


def test_faults_of_the_options_are_named():
    q, k, _ = draws.draw_heads("random", 0, 1, 1, 4, 16)
    for num_keys in (0, 5):
        with pytest.raises(ValueError, match="got num_keys"):
            pooled_quantiles(q, k, (0.5,), num_keys=num_keys)
        with pytest.raises(ValueError, match="got num_keys"):
            row_quantiles(q, k, (0.5,), num_keys=num_keys)
    with pytest.raises(ValueError, match="got rank_error"):
        pooled_quantiles(q, k, (0.5,), rank_error=-1e-4)
    with pytest.raises(ValueError, match="got backend"):
        pooled_quantiles(q, k, (0.5,), backend="exact")
    for find in (pooled_quantiles, row_quantiles):
        for backend in ("dense", "chunked"):
            with pytest.raises(ValueError, match="got ratios"):
                find(q, k, (1.5,), backend=backend)
