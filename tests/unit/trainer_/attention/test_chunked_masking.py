"""Masked attention: the float64 reference, the two ends of the ratio, row maxima, ties, chunks."""

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tests.support import attention_draws as draws
from trainer.attention import dense as reference
from trainer.attention import masked_attention, pooled_quantiles, row_quantiles, uniform_attention
from trainer.attention.chunked_weights import weight_chunks
from trainer.attention.inputs import checked


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
def test_ratio_one_keeps_one_weight_a_row_where_none_tie(chunk):
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


# -- drawn distributions, options, back ends --------------------------------------------------------------------------


def clear_threshold(weights: torch.Tensor, ratio: float) -> torch.Tensor:
    """Near the ratio's order statistic of (..., weights), a value that no weight is close to; 0 where there is none."""
    ordered = weights.sort(dim=-1).values
    at = reference.rank(ratio, ordered.shape[-1])
    low, high = ordered[..., :-1], ordered[..., 1:]
    far = (high > low * 1.001) & (high > 1e-34)
    distance = (torch.arange(high.shape[-1]) - at).abs().expand_as(high).masked_fill(~far, 10**9)
    if not high.shape[-1]:
        return torch.zeros(weights.shape[:-1])
    place = distance.argmin(dim=-1, keepdim=True)
    middle = (low.clamp(min=1e-37) * high).sqrt().gather(-1, place)
    return middle.masked_fill(~far.gather(-1, place), 0.0)[..., 0].float()


@settings(max_examples=150, deadline=None)
@given(
    draws.heads_strategy, st.floats(0, 1), st.integers(1, 50), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(["zero", "mean"]), st.integers(1, 60),
)  # fmt: skip
def test_every_option_agrees_with_the_float64_reference(drawn, ratio, chunk, per_row, padded, renorm, tail, num_keys):
    q, k, v = draws.draw_heads(*drawn)
    v = v.float()
    lengths = draws.lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    options = {"num_keys": min(num_keys, k.shape[2]), "lengths": lengths, "renormalise": renorm, "tail": tail}
    weights = reference.attention_weights(q, k, lengths)
    thresholds = clear_threshold(weights if per_row else weights.flatten(2), ratio)
    got = masked_attention(q, k, v, thresholds, chunk=chunk, **options)
    truth = reference.masked_attention(weights, v, thresholds, **options)
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(got[1].double(), truth[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[2].double(), truth[2], rtol=1e-3, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(draws.heads_strategy, st.integers(1, 50), st.booleans(), st.sampled_from(["zero", "mean"]), st.booleans())
def test_ratio_zero_is_dense_bit_for_bit(drawn, chunk, renormalise, tail, per_row):
    q, k, v = draws.draw_heads(*drawn)
    find = row_quantiles if per_row else pooled_quantiles
    options = {"renormalise": renormalise, "tail": tail}
    out, realised, dropped = masked_attention(
        q, k, v, find(q, k, (0.0,), chunk=chunk)[..., 0], chunk=chunk, backend="chunked", **options
    )
    dense = torch.cat([w @ v.float() for _, w in weight_chunks(checked(q, k, chunk=chunk))], dim=2).to(v.dtype)
    assert torch.equal(out, dense) and realised.max() == dropped.max() == 0

    thresholds = find(q, k, (0.0,), backend="dense")[..., 0]
    out, realised, dropped = masked_attention(q, k, v, thresholds, backend="dense", **options)
    assert torch.equal(out, (reference.attention_weights(q, k) @ v.double()).to(v.dtype))
    assert realised.max() == dropped.max() == 0


@settings(max_examples=60, deadline=None)
@given(draws.heads_strategy, st.integers(1, 50), st.booleans(), st.sampled_from(["dense", "chunked"]))
def test_ratio_one_keeps_exactly_the_row_maxima(drawn, chunk, per_row, backend):
    q, k, v = draws.draw_heads(*drawn)
    find = row_quantiles if per_row else pooled_quantiles
    thresholds = find(q, k, (1.0,), chunk=chunk, backend=backend)[..., 0]
    v = v.float()
    out, realised, _ = masked_attention(q, k, v, thresholds, chunk=chunk, backend=backend)
    if backend == "dense":
        weights = reference.attention_weights(q, k)
    else:
        weights = draws.chunked_weights(q, k, chunk=chunk)
    largest = weights == weights.amax(dim=-1, keepdim=True)  # ties are kept all
    expected = 1 - largest.double().mean(dim=(-1, -2))
    torch.testing.assert_close(realised.double(), expected, rtol=1e-6, atol=1e-7)
    mean = (largest.double() / largest.sum(dim=-1, keepdim=True)) @ v.double()
    torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(draws.heads_strategy, st.integers(1, 50), st.floats(0, 1), st.integers(1, 45), st.booleans())
def test_realised_ratio_counts_what_lies_below_among_the_pooled(drawn, chunk, ratio, num_keys, padded):
    q, k, v = draws.draw_heads(*drawn)
    options = {"num_keys": min(num_keys, k.shape[2]), "chunk": chunk}
    options["lengths"] = lengths = draws.lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    thresholds = pooled_quantiles(q, k, (ratio,), **options)[..., 0]
    _, realised, _ = masked_attention(q, k, v, thresholds, **options)
    assert (realised <= ratio + 1e-6).all()
    every = draws.chunked_weights(q, k, chunk=chunk, lengths=lengths)
    for sample, length in enumerate(lengths or [q.shape[2]] * q.shape[0]):
        own = every[sample, :, :length]
        pool = own[..., : min(length, options["num_keys"])]
        removed = (pool < thresholds[sample, :, None, None]) & (pool < own.amax(dim=-1, keepdim=True))
        torch.testing.assert_close(realised[sample].double(), removed.double().mean(dim=(1, 2)), rtol=1e-6, atol=1e-7)


def test_tail_mean_replaces_each_removed_weight_by_their_mean():
    weights = torch.tensor([0.5, 0.3, 0.12, 0.06, 0.02])
    q = (weights.log() * 5**0.5).expand(1, 1, 5, 5).contiguous()
    k = v = torch.eye(5)[None, None]
    out, realised, dropped = masked_attention(q, k, v, torch.full((1, 1), 0.2), tail="mean")
    torch.testing.assert_close(out[0, 0, 0], torch.tensor([0.5, 0.3, 0.2 / 3, 0.2 / 3, 0.2 / 3]))
    assert (realised.item(), dropped.item()) == (pytest.approx(0.6), pytest.approx(0.2))


def test_text_keys_from_num_keys_on_are_never_removed():
    q, k, v = draws.draw_heads("random", 1, 1, 2, 20, 16)
    only_text = reference.attention_weights(q, k)
    out, realised, _ = masked_attention(q, k, v, torch.full((1, 2), torch.inf), num_keys=15, renormalise=False)
    vision_winner = only_text[..., :15] == only_text.amax(dim=-1, keepdim=True)
    only_text[..., :15] *= vision_winner
    torch.testing.assert_close(out.double(), only_text @ v.double(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(realised.double(), 1 - vision_winner.double().mean(dim=(-1, -2)))


def test_lengths_equal_each_sample_alone():
    q, k, v = draws.draw_heads("sharp", 8, 2, 3, 31, 16)
    for t in (q, k, v):
        t[0, :, 20:] = 1e4  # what lies behind may be anything
    thresholds = torch.full((2, 3), 0.02)
    options = {"num_keys": 25, "chunk": 8}
    got = masked_attention(q, k, v, thresholds, lengths=[20, 31], **options)
    assert got[0][0, :, 20:].abs().max() == 0
    for sample, length in enumerate([20, 31]):
        own = [t[sample : sample + 1, :, :length] for t in (q, k, v)]
        alone = masked_attention(*own, thresholds[:1], num_keys=min(25, length))
        torch.testing.assert_close(got[0][sample, :, :length], alone[0][0])
        assert torch.equal(got[1][sample], alone[1][0])
        torch.testing.assert_close(got[2][sample], alone[2][0])


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("tail", ["zero", "mean"])
def test_rows_that_are_no_number_lose_nothing_and_the_others_what_they_would(backend, tail):
    q, k, v = draws.draw_heads("random", 7, 1, 2, 12, 16)
    limit, how = torch.full((1, 2), 0.05), {"chunk": 5, "tail": tail, "backend": backend}
    whole = masked_attention(q, k, v, limit, **how)
    gone = reference.attention_weights(q, k)[0, 0, 3] < 0.05
    assert 0 < gone.sum() < 12
    q[0, 0, 3] = torch.nan
    out, realised, dropped = masked_attention(q, k, v, limit, **how)
    assert out[0, 0, 3].isnan().all() and dropped[0, 0].isnan() and not dropped[0, 1].isnan()
    out[0, 0, 3] = whole[0][0, 0, 3]
    torch.testing.assert_close(out, whole[0])
    assert realised[0, 0].item() == pytest.approx(whole[1][0, 0].item() - gone.sum().item() / 144, abs=1e-6)
    # No number as a threshold: what a quantile of such weights is.
    out, realised, dropped = masked_attention(q, k, v, torch.tensor([[0.05, torch.nan]]), **how)
    assert realised[0, 1] == 0 and dropped[0, 1] == 0
    torch.testing.assert_close(out[0, 1].double(), (reference.attention_weights(q, k) @ v.double())[0, 1])


def test_faults_of_the_options_are_named():
    q, k, v = draw_heads(0, 1, 2, 4, 2, 1.0)
    limit = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="got thresholds of shape"):
        masked_attention(q, k, v, torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="got tail 'median'"):
        masked_attention(q, k, v, limit, tail="median")
    with pytest.raises(ValueError, match="got backend"):
        masked_attention(q, k, v, limit, backend="fast")
    with pytest.raises(ValueError, match="got num_keys 9"):
        masked_attention(q, k, v, limit, num_keys=9)
