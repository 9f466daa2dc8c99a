"""Masked attention: the float64 reference, the two ends of the ratio, row maxima, ties, chunks."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from trainer.attention import masked_attention, pooled_quantiles, reference, uniform_attention


def draw_heads(seed: int, batch: int, heads: int, tokens: int, width: int, scale: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, width, generator=generator) for _ in range(3))
    return q * scale, k, v


heads_strategy = st.tuples(
    st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 3), st.integers(1, 23), st.sampled_from([2, 8]),
    st.sampled_from([0.0, 0.3, 1.0, 8.0]),
)  # fmt: skip


def midway(weights: torch.Tensor, ratio: float) -> torch.Tensor:
    """A threshold between two neighbouring float64 weights, so that rounding decides nothing; (B, h)."""
    ordered = weights.flatten(2).sort(dim=-1).values
    at = reference.rank(ratio, ordered.shape[-1])
    return (ordered[..., max(at - 1, 0)] + ordered[..., at]) / 2


@settings(max_examples=60, deadline=None)
@given(heads_strategy, st.floats(0, 1), st.booleans(), st.integers(1, 25))
def test_agrees_with_the_float64_reference(drawn, ratio, renormalise, chunk):
    q, k, v = draw_heads(*drawn)
    weights = reference.attention_weights(q, k)
    thresholds = midway(weights, ratio)
    near = ((weights - thresholds[..., None, None]).abs() < 1e-5 * thresholds[..., None, None]).sum(dim=(-1, -2))
    if drawn[-1] == 0.0 or near.any():  # a tie with the threshold: only the exact tests below can judge
        reject()
    got = masked_attention(q, k, v, thresholds.float(), chunk=chunk, renormalise=renormalise)
    truth = reference.masked_attention(weights, v, thresholds, renormalise=renormalise)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[1].double(), truth[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[2].double(), truth[2], rtol=1e-3, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(heads_strategy, st.integers(1, 25), st.sampled_from([0.1, 0.5, 0.9]))
def test_removes_what_the_quantile_pass_promised(drawn, chunk, ratio):
    q, k, v = draw_heads(*drawn)
    thresholds = pooled_quantiles(q, k, (ratio,), chunk=chunk)[..., 0]
    _, realised, _ = masked_attention(q, k, v, thresholds, chunk=chunk)
    tokens = q.shape[2]
    assert (realised <= ratio + 1e-6).all()
    if drawn[-1] in (0.3, 1.0) and tokens > 1:  # no ties: short of the ratio only by row maxima and the floor
        assert (realised >= ratio - (tokens + 1) / tokens**2 - 1e-6).all()


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_ratio_zero_removes_nothing(chunk):
    q, k, v = draw_heads(0, 2, 3, 17, 8, 4.0)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    lowest = pooled_quantiles(q, k, (0.0,), chunk=chunk)[..., 0]
    for thresholds in (lowest, torch.zeros(2, 3), torch.full((2, 3), -torch.inf)):
        out, realised, dropped = masked_attention(q, k, v, thresholds, chunk=chunk)
        assert realised.max() == 0 and dropped.max() == 0
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 1, 5])
def test_ratio_one_keeps_exactly_the_row_maxima(chunk):
    q, k, v = draw_heads(0, 2, 3, 17, 8, 4.0)
    thresholds = pooled_quantiles(q, k, (1.0,), chunk=chunk)[..., 0]
    weights = reference.attention_weights(q, k)
    for limit in (thresholds, torch.full((2, 3), torch.inf)):
        out, realised, dropped = masked_attention(q, k, v, limit, chunk=chunk)
        winner = weights.argmax(dim=-1)[..., None].expand(-1, -1, -1, v.shape[-1])
        torch.testing.assert_close(out, v.gather(2, winner))
        torch.testing.assert_close(realised, torch.full((2, 3), 16 / 17))
        torch.testing.assert_close(dropped.double(), 1 - weights.amax(-1).mean(-1), rtol=1e-4, atol=1e-6)


def test_uniform_attention_ties_and_is_left_whole():
    k, v = torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4)
    q = torch.zeros_like(k)
    for ratio in (0.1, 0.9, 1.0):
        thresholds = pooled_quantiles(q, k, (ratio,), chunk=4)[..., 0]
        out, realised, _ = masked_attention(q, k, v, thresholds, chunk=4)
        assert realised.max() == 0
        torch.testing.assert_close(out, uniform_attention(v))


def test_single_token_attends_to_itself():
    q, k, v = draw_heads(1, 2, 2, 1, 4, 1.0)
    thresholds = pooled_quantiles(q, k, (0.9,))[..., 0]
    out, realised, dropped = masked_attention(q, k, v, thresholds)
    assert torch.equal(out, v) and realised.max() == 0 and dropped.max() == 0


def test_weights_below_float32_tie_at_zero_and_stay():
    # Rows that hold one weight of 1 and the rest underflowed: removing or keeping zeros is the same attention.
    q = torch.eye(8)[None, None] * 1e4
    k, v = torch.eye(8)[None, None], torch.randn(1, 1, 8, 4)
    thresholds = pooled_quantiles(q, k, (0.5,), chunk=3)[..., 0]
    out, realised, dropped = masked_attention(q, k, v, thresholds, chunk=3)
    assert thresholds.item() == 0 and realised.item() == 0 and dropped.item() == 0
    assert torch.equal(out, v)


def test_small_dropped_mass_is_not_lost_to_rounding():
    # Every row puts all but 1e-10 on itself: one minus the kept mass would be 0 or noise of 1e-7.
    tokens, gap = 6, 25.0
    q = torch.eye(tokens)[None, None] * gap * tokens**0.5
    k = v = torch.eye(tokens)[None, None]
    _, realised, dropped = masked_attention(q, k, v, torch.full((1, 1), 0.5))
    weight = torch.exp(torch.tensor(-gap, dtype=torch.float64))
    expected = (tokens - 1) * weight / (1 + (tokens - 1) * weight)
    torch.testing.assert_close(dropped.double()[0, 0], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(realised[0, 0], torch.tensor((tokens - 1) / tokens))


def test_chunk_size_does_not_change_results():
    q, k, v = draw_heads(2, 2, 2, 33, 8, 3.0)
    thresholds = midway(reference.attention_weights(q, k), 0.6).float()
    dense = masked_attention(q, k, v, thresholds)
    for chunk in (1, 10, 32):
        for got, expected in zip(masked_attention(q, k, v, thresholds, chunk=chunk), dense, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_same_call_twice_is_the_same_bit_for_bit_and_leaves_its_inputs_alone():
    q, k, v = draw_heads(2, 2, 2, 33, 8, 3.0)
    copies = [t.clone() for t in (q, k, v)]
    thresholds = pooled_quantiles(q, k, (0.5,), chunk=8)[..., 0]
    first, second = (masked_attention(q, k, v, thresholds, chunk=8) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), copies, strict=True))


def test_output_keeps_the_dtype_of_v():
    q, k, v = (t.bfloat16() for t in draw_heads(2, 1, 2, 9, 8, 1.0))
    out, realised, dropped = masked_attention(q, k, v, torch.zeros(1, 2))
    assert (out.dtype, realised.dtype, dropped.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert uniform_attention(v).dtype == torch.bfloat16


def test_wrong_thresholds_are_named():
    q, k, v = draw_heads(0, 1, 2, 4, 2, 1.0)
    with pytest.raises(ValueError, match="select one ratio"):
        masked_attention(q, k, v, torch.zeros(1, 2, 3))
