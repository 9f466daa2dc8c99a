"""Pooled quantiles: bit-exact order statistics, ties, chunks, and agreement with the float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.attention import pooled_quantiles, reference
from trainer.attention.quantile import ranks
from trainer.attention.rows import float32_matmul, weight_rows

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
    return torch.cat([rows for _, rows in weight_rows(q, k, chunk=chunk)], dim=2)


@settings(max_examples=60, deadline=None)
@given(heads_strategy, st.integers(1, 25))
def test_is_the_exact_order_statistic_of_the_weights(drawn, chunk):
    q, k, _ = draw_heads(*drawn)
    weights = all_weights(q, k, chunk)
    total = weights[0, 0].numel()
    ordered = np.sort(weights.flatten(2).numpy(), axis=-1)
    got = pooled_quantiles(q, k, RATIOS, chunk=chunk)
    expected = torch.from_numpy(ordered[..., ranks(RATIOS, total)])
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
    assert ranks([ratio], total) == [expected]


def test_many_ratios_that_share_leading_bits():
    q, k, _ = draw_heads(1, 1, 2, 40, 8, 0.01)  # all weights within a few per cent of 1/40
    ratios = tuple(i / 50 for i in range(51))
    weights = all_weights(q, k, 16)
    expected = np.sort(weights.flatten(2).numpy(), axis=-1)[..., ranks(ratios, 1600)]
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
