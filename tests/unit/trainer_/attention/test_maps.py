"""Histograms, pooled maps and mass by frame offset: the float64 reference, closed forms, chunks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention_draws import draw_heads, heads_strategy, lengths_of
from trainer.attention import dense as reference
from trainer.attention import frame_offset_mass, log_histogram, pooled_map


@settings(max_examples=80, deadline=None)
@given(
    heads_strategy, st.integers(1, 50), st.booleans(), st.sampled_from([1, 7, 64]), st.sampled_from([1e-12, 1e-3, 0.9]),
)  # fmt: skip
def test_log_histogram_agrees_with_the_float64_reference(drawn, chunk, padded, bins, lowest):
    q, k, _ = draw_heads(*drawn)
    lengths = lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    got = log_histogram(q, k, bins=bins, lowest=lowest, lengths=lengths, chunk=chunk)
    weights = reference.attention_weights(q, k, lengths)
    truth = reference.log_histogram(weights, bins=bins, lowest=lowest, lengths=lengths)
    assert got.dtype == torch.int64 and got.min() >= 0 and torch.equal(got.sum(dim=-1), truth.sum(dim=-1))
    # Rounding may move a weight by one bin, only where it lies within 1e-5 of the edge between them.
    edges = torch.logspace(math.log10(lowest), 0, bins + 1, dtype=torch.float64)[1:-1]
    near = ((weights[..., None] / edges - 1).abs() < 1e-5 + 1e-6 * math.sqrt(q.shape[-1])).sum(dim=(2, 3))
    above, true_above = (t.flip(-1).cumsum(dim=-1).flip(-1)[..., 1:] for t in (got, truth))
    assert ((above - true_above).abs() <= near).all()


def test_log_histogram_of_known_weights():
    uniform, _, _ = draw_heads("uniform", 0, 1, 1, 20, 16)
    got = log_histogram(uniform, uniform, bins=4, lowest=1e-4, chunk=7)
    assert got[0, 0].tolist() == [0, 0, 400, 0]  # 1/20 lies between 1e-2 and 1e-1
    q, k, _ = draw_heads("peaked", 3, 1, 1, 40, 64)
    got = log_histogram(q, k, bins=5)
    assert got[0, 0].tolist() == [40 * 39, 0, 0, 0, 40]  # underflow in the first, 1.0 in the last


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_log_histogram_takes_weights_that_are_no_number(backend):
    q, k, _ = draw_heads("random", 3, 1, 2, 10, 16)
    whole = log_histogram(q, k, bins=5, backend=backend)
    q[0, 0, 2] = torch.nan
    broken = log_histogram(q, k, bins=5, backend=backend)
    assert broken.sum() == 200 and broken[0, 0, 0] >= 10 and torch.equal(broken[0, 1], whole[0, 1])


@settings(max_examples=80, deadline=None)
@given(heads_strategy, st.integers(1, 50), st.integers(1, 60))
def test_pooled_map_agrees_with_the_float64_reference(drawn, chunk, size):
    q, k, _ = draw_heads(*drawn)
    got = pooled_map(q, k, size, chunk=chunk)
    truth = reference.pooled_map(reference.attention_weights(q, k), size)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), truth, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(got.mean(dim=(-1, -2)), torch.full(q.shape[:2], 1 / k.shape[2]))


def test_pooled_map_is_the_mean_over_blocks_where_tokens_divide_evenly():
    q, k, _ = draw_heads("sharp", 3, 2, 2, 24, 16)
    weights = reference.attention_weights(q, k)
    blocks = weights.unflatten(3, (6, 4)).unflatten(2, (6, 4)).mean(dim=(3, 5))
    torch.testing.assert_close(pooled_map(q, k, 6, chunk=5).double(), blocks, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(pooled_map(q, k, 24, chunk=5).double(), weights, rtol=1e-4, atol=1e-7)
    twice = weights.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(pooled_map(q, k, 48, chunk=5).double(), twice, rtol=1e-4, atol=1e-7)


def test_pooled_map_puts_queries_first():
    q, k, _ = draw_heads("sink", 13, 1, 1, 20, 16)
    sink = 13
    found = pooled_map(q, k, 4)[0, 0]
    assert (found.argmax(dim=1) == sink // 5).all()


@settings(max_examples=60, deadline=None)
@given(heads_strategy, st.integers(1, 50), st.integers(1, 6), st.integers(1, 6))
def test_frame_offset_mass_agrees_with_the_float64_reference(drawn, chunk, frames, tokens_per_frame):
    q, k, _ = draw_heads(*drawn)
    vision = frames * tokens_per_frame
    if vision > q.shape[2]:
        q, k = (torch.cat([t] * vision, dim=2) for t in (q, k))
    got = frame_offset_mass(q, k, frames, tokens_per_frame, chunk=chunk)
    weights = reference.attention_weights(q, k)
    truth = reference.frame_offset_mass(weights, frames, tokens_per_frame)
    # A weight is relatively as wrong as its float32 logit is absolutely, 1e-3 where logits are 11,585.
    logit = (q.double() @ k.double().mT).abs().max() / q.shape[-1] ** 0.5
    torch.testing.assert_close(got.double(), truth, rtol=1e-4 + 2.0**-23 * float(logit), atol=1e-7)
    text = weights[:, :, :vision, vision:].sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(got.double().sum(dim=-1) + text, torch.ones_like(text), rtol=1e-5, atol=1e-6)


def test_frame_offsets_count_from_the_query_to_the_key():
    # Three frames of two tokens, one text token; every query attends to the first token of frame 2.
    q, k = torch.zeros(1, 1, 7, 16), torch.zeros(1, 1, 7, 16)
    q[..., 0], k[0, 0, 4, 0] = 1000.0, 1000.0
    got = frame_offset_mass(q, k, 3, 2)[0, 0]
    torch.testing.assert_close(got, torch.tensor([0.0, 0.0, 1 / 3, 1 / 3, 1 / 3]))  # offsets -2 .. 2
    uniform = frame_offset_mass(torch.zeros_like(q), k, 3, 2)[0, 0]
    torch.testing.assert_close(uniform * 7 * 6, torch.tensor([4.0, 8.0, 12.0, 8.0, 4.0]))


def test_frame_offset_mass_leaves_padding_out():
    q, k, _ = draw_heads("sharp", 5, 2, 3, 17, 16)
    lengths = [17, 13]
    got = frame_offset_mass(q, k, 3, 4, lengths=lengths, chunk=5)
    for sample, length in enumerate(lengths):
        own = slice(sample, sample + 1)
        alone = frame_offset_mass(q[own, :, :length], k[own, :, :length], 3, 4)
        torch.testing.assert_close(got[own], alone)
    assert not torch.allclose(got[1], frame_offset_mass(q, k, 3, 4)[1], rtol=1e-3)
    with pytest.raises(ValueError, match=r"of which \[17, 11\] are valid"):
        frame_offset_mass(q, k, 3, 4, lengths=[17, 11])


@pytest.mark.parametrize("measure", [
    lambda q, k: pooled_map(q, k, 5, chunk=7),
    lambda q, k: log_histogram(q, k, chunk=7),
    lambda q, k: frame_offset_mass(q, k, 3, 4, chunk=7),
])  # fmt: skip
def test_autocast_rounds_nothing(measure):
    q, k, _ = draw_heads("random", 5, 1, 2, 23, 16)
    plain = measure(q, k)
    with torch.autocast("cpu", torch.bfloat16):
        found = measure(q, k)
    assert found.dtype == plain.dtype and torch.equal(found, plain)


def test_faults_are_named():
    q, k, _ = draw_heads("random", 0, 1, 1, 6, 16)
    with pytest.raises(ValueError, match="got 0 bins"):
        log_histogram(q, k, bins=0)
    with pytest.raises(ValueError, match="got 8 bins from"):
        log_histogram(q, k, bins=8, lowest=1.0)
    with pytest.raises(ValueError, match="got backend 'fast'"):
        log_histogram(q, k, backend="fast")
    with pytest.raises(ValueError, match="got size 0"):
        pooled_map(q, k, 0)
    with pytest.raises(ValueError, match="got 3 frames of 3 tokens"):
        frame_offset_mass(q, k, 3, 3)
    for call in (log_histogram, pooled_map, lambda q, k: frame_offset_mass(q, k, 1, 1)):
        with pytest.raises(ValueError, match="got q of shape"):
            call(q[0], k[0])
