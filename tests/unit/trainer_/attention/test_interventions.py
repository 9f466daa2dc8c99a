"""Interventions on drawn q, k, v: exact against the dense float64 reference.

Legend: B batch, N vision tokens, L text tokens, h heads, d head width.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention_draws import DTYPES, KINDS, draw_heads, reduced_attention
from trainer.attention import dense as reference
from trainer.attention import interventions
from trainer.attention.interventions import (
    first_text_token,
    skip_heads,
    temperature,
    transfer,
    transfer_within_batch,
)
from trainer.models.layout import AttentionCall, TokenLayout, dense_attention

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def call_of(vision: int, lengths: tuple[int, ...], layer: int = 0) -> AttentionCall:
    """A call with `vision` tokens and captions of these lengths, padded to the longest."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return AttentionCall(layer, TokenLayout.of((1, 1, vision), lengths, mask))


def assert_exact(got, expected, dtype):
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@dataclass
class Drawn:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    vision: int
    lengths: tuple[int, ...]
    call: AttentionCall


@st.composite
def inputs(draw, kinds=KINDS):
    batch, heads, vision = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 30))
    lengths = tuple(draw(st.lists(st.integers(0, 6), min_size=batch, max_size=batch)))
    width, dtype = draw(st.sampled_from([16, 64, 128])), draw(st.sampled_from(DTYPES))
    tensors = draw_heads(
        draw(st.sampled_from(kinds)), draw(st.integers(0, 999)), batch, heads, vision + max(lengths), width, dtype
    )
    return Drawn(*tensors, vision, lengths, call_of(vision, lengths))


#: A temperature near 0 or other keys turn the exact logits of the other kinds into sums that float32 rounds.
SMOOTH = ("random", "uniform", "sink", "diagonal")


@settings(max_examples=40, deadline=None)
@given(inputs())
def test_nothing_changed_is_the_models_own_attention_bit_for_bit(x):
    own = dense_attention(x.q, x.k, x.v, x.call)
    assert torch.equal(interventions.unmodified_attention(x.q, x.k, x.v, x.call), own)
    for nothing in (
        skip_heads([]),
        temperature(2.0, heads=[]),
        transfer(x.q, x.k),
        first_text_token(x.vision, heads=[]),
    ):
        assert torch.equal(nothing(x.q, x.k, x.v, x.call), own)


@settings(max_examples=60, deadline=None)
@given(inputs(), st.sets(st.integers(0, 3)))
def test_skipped_heads_give_zeros_and_the_others_are_unchanged(x, heads):
    heads &= set(range(x.q.shape[1]))
    out = skip_heads(heads)(x.q, x.k, x.v, x.call)
    own = dense_attention(x.q, x.k, x.v, x.call)
    for head in range(x.q.shape[1]):
        expected = torch.zeros_like(own[:, head]) if head in heads else own[:, head]
        assert torch.equal(out[:, head], expected)


def test_a_skipped_head_is_zero_even_where_its_output_is_no_number():
    q, k, v = draw_heads("random", 0, 1, 2, 9, 16)
    v[:, 1] = torch.nan
    out = skip_heads([1])(q, k, v, call_of(9, (0,)))
    assert out[:, 1].abs().max() == 0 and torch.isfinite(out).all()


@settings(max_examples=80, deadline=None)
@given(inputs(SMOOTH), st.sampled_from([0.25, 0.5, 0.7, 1.0, 1.5, 2.0]), st.sets(st.integers(0, 3)), st.booleans())
def test_temperature_is_exact(x, value, heads, all_heads):
    heads = set(range(x.q.shape[1])) if all_heads else heads & set(range(x.q.shape[1]))
    out = temperature(value, heads=None if all_heads else heads)(x.q, x.k, x.v, x.call)
    changed = reduced_attention(x.q, x.k, x.v, x.lengths, x.vision, value=value)
    dense = reduced_attention(x.q, x.k, x.v, x.lengths, x.vision)
    picked = torch.tensor([head in heads for head in range(x.q.shape[1])])[None, :, None, None]
    assert_exact(out, torch.where(picked, changed, dense), x.q.dtype)


@settings(max_examples=80, deadline=None)
@given(inputs(), st.sampled_from(SMOOTH), st.integers(0, 999), st.sets(st.integers(0, 3)), st.booleans())
def test_transfer_is_the_sources_map_times_the_targets_values(x, kind, seed, heads, all_heads):
    source_q, source_k, _ = draw_heads(kind, seed, *x.q.shape, x.q.dtype)
    heads = set(range(x.q.shape[1])) if all_heads else heads & set(range(x.q.shape[1]))
    out = transfer(source_q, source_k, heads=None if all_heads else heads)(x.q, x.k, x.v, x.call)
    injected = torch.zeros(x.q.shape, dtype=torch.float64)  # A itself, stored, times V
    for sample, length in enumerate(x.lengths):
        valid = x.vision + length
        cut = [t[sample, :, :valid][None] for t in (source_q, source_k, x.q, x.k)]
        weights, own = reference.attention_weights(*cut[:2])[0], reference.attention_weights(*cut[2:])[0]
        for head in range(x.q.shape[1]):
            used = weights if head in heads else own
            injected[sample, head, :valid] = used[head] @ x.v[sample, head, :valid].double()
    assert_exact(out, injected, x.q.dtype)


@settings(max_examples=60, deadline=None)
@given(inputs(SMOOTH), st.one_of(st.none(), st.integers(0, 6)), st.sets(st.integers(0, 3)), st.booleans())
def test_first_text_token_drops_the_other_text_keys(x, keep, heads, all_heads):
    heads = set(range(x.q.shape[1])) if all_heads else heads & set(range(x.q.shape[1]))
    out = first_text_token(x.vision, keep, heads=None if all_heads else heads)(x.q, x.k, x.v, x.call)
    keys = [*range(x.vision), *([] if keep is None else [x.vision + keep])]
    changed = reduced_attention(x.q, x.k, x.v, x.lengths, x.vision, keys=keys)
    dense = reduced_attention(x.q, x.k, x.v, x.lengths, x.vision)
    picked = torch.tensor([head in heads for head in range(x.q.shape[1])])[None, :, None, None]
    assert_exact(out, torch.where(picked, changed, dense), x.q.dtype)


@pytest.mark.parametrize("keep", [0, 3, None, 5])
def test_one_text_token_of_cross_attention_gives_every_query_its_value(keep):
    q, _, _ = draw_heads("random", 1, 2, 3, 9, 16)
    _, k, v = draw_heads("sharp", 2, 2, 3, 5, 16)
    call = AttentionCall(0, TokenLayout((1, 1, 9), (5, 2), 5, None), "cross")
    out = first_text_token(9, keep)(q, k, v, call)
    expected = torch.zeros_like(q) if keep in (None, 5) else v[:, :, keep : keep + 1].expand_as(q)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=0)


def test_transfer_within_batch_uses_another_sample_of_the_batch():
    q, k, v = draw_heads("sharp", 1, 3, 2, 12, 16)
    call = call_of(9, (3, 3, 3))
    out = transfer_within_batch([0, 0, 2], heads=[1])(q, k, v, call)
    own = reduced_attention(q, k, v, (3, 3, 3), 9)
    own[1, 1] = reduced_attention(q[:1], k[:1], v[1:2], (3,), 9)[0, 1]
    assert_exact(out, own, torch.float32)
    with pytest.raises(ValueError, match=r"got a map from captions of \(1, 1, 3\) tokens"):
        transfer_within_batch([0, 0, 2])(q, k, v, call_of(9, (1, 3, 3)))
    with pytest.raises(ValueError, match="got sources"):
        transfer_within_batch([0, 0])(q, k, v, call)
    with pytest.raises(ValueError, match="got sources"):
        transfer_within_batch([0, 3, 1])(q, k, v, call)


@pytest.mark.parametrize("site", ["self", "cross"])
def test_caption_lengths_are_compared_where_text_is_among_the_keys(site):
    q, k, v = draw_heads("sharp", 1, 2, 2, 9, 16)
    call = AttentionCall(0, TokenLayout((1, 1, 9), (3, 1), 9 if site == "cross" else 0, None), site)
    source = q[[1, 0]], k[[1, 0]]
    within, across = transfer_within_batch([1, 0]), transfer(*source, text_lengths=(1, 3))
    if site == "self":
        assert_exact(across(q, k, v, call), reference.attention_weights(*source) @ v.double(), torch.float32)
        assert torch.equal(within(q, k, v, call), across(q, k, v, call))
        return
    for function in (within, across):
        with pytest.raises(ValueError, match=r"got a map from captions of \(1, 3\) tokens for captions of \(3, 1\)"):
            function(q, k, v, call)


def test_interventions_compose_and_gradients_pass():
    q, k, v = (t.requires_grad_() for t in draw_heads("random", 1, 1, 3, 12, 16))
    both = skip_heads([0], attend=temperature(0.5, heads=[1], attend=first_text_token(9)))
    out = both(q, k, v, call_of(9, (3,)))
    expected = reduced_attention(q, k, v, (3,), 9, keys=range(10))
    expected[:, 0] = 0
    expected[:, 1] = reduced_attention(q, k, v, (3,), 9, value=0.5)[:, 1]
    assert_exact(out, expected, torch.float32)
    out.square().sum().backward()
    assert all(t.grad[:, 0].abs().max() == 0 and t.grad[:, 2].abs().max() > 0 for t in (q, k, v))


def test_faults_are_named():
    q, k, v = draw_heads("random", 0, 1, 2, 9, 16)
    call = call_of(6, (3,))
    for bad in (
        skip_heads([2]),
        temperature(2.0, heads=[-1]),
        transfer(q, k, heads=[5]),
        first_text_token(6, heads=[2]),
    ):
        with pytest.raises(ValueError, match="got heads"):
            bad(q, k, v, call)
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="got temperature"):
            temperature(value)
    for source in ((q[:, :, :8], k), (q, k[:, :, :8])):
        with pytest.raises(ValueError, match="got a map from q of shape"):
            transfer(*source)(q, k, v, call)
    with pytest.raises(ValueError, match="got a map from captions of"):
        transfer(q, k, text_lengths=(2,))(q, k, v, call)
    with pytest.raises(ValueError, match="got num_vision 6 and keep -1"):
        first_text_token(6, -1)
    with pytest.raises(ValueError, match="got 9 tokens"):
        first_text_token(10)(q, k, v, call)
    with pytest.raises(ValueError, match="got self attention in layer 0, expected joint or cross"):
        first_text_token(6)(q, k, v, replace(call, site="self"))
