"""Masked attention in whole Mochi models, all blocks through the engine: the ends of the ratio, ties, chunks, peaks.

Legend: B batch, N tokens ([vision | text]), h heads, d head width, R ratios.
"""

import copy
import math

import pytest
import torch

from tests.support import known_answers
from trainer.attention import dense as reference
from trainer.attention import (
    masked_attention,
    pooled_quantiles,
    row_quantiles,
    row_statistics,
    sink_statistics,
    uniform_attention,
)
from trainer.attention.chunked_weights import weight_chunks
from trainer.attention.inputs import checked
from trainer.models.mochi import SplitMochi

backends = pytest.mark.parametrize("backend", known_answers.BACKENDS)
#: Only the chunked back end has a chunk size.
chunk_sizes = pytest.mark.parametrize(
    "backend, chunk", [("dense", None), ("chunked", None), ("chunked", 6), known_answers.interpreted("triton", None)]
)
#: 5 * 3 * 2 vision tokens and 5 text tokens.
GRID, TEXT, TOKENS = (5, 6, 4), 5, 35


@pytest.fixture
def split_model(make_transformer):
    return SplitMochi(make_transformer(3))


@pytest.fixture
def batch(make_batch):
    return make_batch((TEXT, TEXT), grid=GRID, seed=1)


def pooled(ratio, **options):
    return lambda q, k: pooled_quantiles(q, k, (ratio,), **options)[..., 0]


def per_row(ratio, **options):
    return lambda q, k: row_quantiles(q, k, (ratio,), **options)[..., 0]


def constant(limit):
    return lambda q, k: torch.full(q.shape[:2], limit)


def masked_velocity(split_model, batch, limits, layers=None, **options):
    """The velocity with `layers` (all) masked at limits(q, k), and each one's realised ratio and dropped mass."""
    found = {}

    def attend(q, k, v, call):
        out, *found[call.layer] = masked_attention(q, k, v, limits(q, k), **options)
        return out

    layers = range(split_model.num_blocks) if layers is None else layers
    got = known_answers.velocity(split_model, batch, dict.fromkeys(layers, attend))
    assert sorted(found) == list(layers)
    return got, {layer: (realised.double(), dropped.double()) for layer, (realised, dropped) in found.items()}


def everywhere(split_model, batch, attend):
    """The velocity where every layer attends by attend(q, k, v)."""
    return known_answers.velocity(
        split_model, batch, dict.fromkeys(range(split_model.num_blocks), lambda q, k, v, call: attend(q, k, v))
    )


def winner(q, k, v):
    """Every query takes the value of its largest weight's key."""
    at = known_answers.softmax64(q, k).argmax(dim=-1)
    return v.gather(2, at[..., None].expand_as(v))


# -- nothing removed ---------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("lengths", [(5, 5), (0, 0), (5, 2)])
def test_the_engine_at_threshold_zero_is_diffusers_own_forward(make_transformer, make_batch, lengths, backend):
    model = make_transformer(3)
    batch = make_batch(lengths, grid=GRID, pad=2)
    want = known_answers.stock_velocity(copy.deepcopy(model), batch)

    def attend(q, k, v, call):
        valid = [call.layout.num_vision + length for length in lengths]
        zero = torch.zeros(q.shape[:2])
        return masked_attention(q, k, v, zero, lengths=valid, backend=backend, chunk=6)[0]

    got = known_answers.velocity(SplitMochi(model), batch, dict.fromkeys(range(3), attend))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - want).norm() < 2e-6 * want.norm()


def dense_velocity(split_model, batch, backend, chunk):
    """The velocity where every layer attends to all keys, in the arithmetic of the back end."""
    dense = {
        "dense": lambda q, k, v: (reference.attention_weights(q, k) @ v.double()).float(),
        "chunked": lambda q, k, v: torch.cat([w @ v for _, w in weight_chunks(checked(q, k, chunk=chunk))], dim=2),
        "triton": lambda q, k, v: masked_attention(q, k, v, torch.full(q.shape[:2], -math.inf), backend="triton")[0],
    }
    return everywhere(split_model, batch, dense[backend])


def assert_nothing_removed(found):
    assert all(realised.max() == dropped.max() == 0 for realised, dropped in found.values())


@chunk_sizes
def test_ratio_zero_is_the_dense_velocity_bit_for_bit(split_model, batch, backend, chunk):
    how = {"chunk": chunk, "backend": backend}
    want = dense_velocity(split_model, batch, backend, chunk)
    for limits in (pooled(0.0, **how), constant(0.0), constant(-math.inf)):
        for options in ({}, {"renormalise": False}, {"tail": "mean"}, {"num_keys": TOKENS - TEXT}):
            got, found = masked_velocity(split_model, batch, limits, **how, **options)
            assert torch.equal(got, want)
            assert_nothing_removed(found)


@chunk_sizes
def test_ratio_zero_of_every_row_is_the_dense_velocity_bit_for_bit(split_model, batch, backend, chunk):
    how = {"chunk": chunk, "backend": backend}
    got, found = masked_velocity(split_model, batch, per_row(0.0, **how), **how)
    assert torch.equal(got, dense_velocity(split_model, batch, backend, chunk))
    assert_nothing_removed(found)


@backends
def test_uniform_attention_is_left_whole_and_is_the_control(make_transformer, batch, backend):
    model = make_transformer(3)
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_q.weight.zero_()
            block.attn1.add_q_proj.weight.zero_()
    split_model, how = SplitMochi(model), {"chunk": 6, "backend": backend}
    # All N^2 weights tie at 1 / N, and none lies strictly below: nothing may go at any ratio.
    whole = dense_velocity(split_model, batch, backend, 6)
    for ratio in (0.1, 0.5, 0.9, 1.0):
        thresholds = known_answers.watch(
            split_model, batch, 1, lambda q, k, v, call, ratio=ratio: pooled(ratio, **how)(q, k)
        )
        torch.testing.assert_close(thresholds.double(), torch.full((2, 2), 1 / TOKENS).double(), rtol=1e-5, atol=0)
        for limits in (pooled(ratio, **how), per_row(ratio, **how)):
            got, found = masked_velocity(split_model, batch, limits, **how)
            assert torch.equal(got, whole)
            assert_nothing_removed(found)
    control = everywhere(split_model, batch, lambda q, k, v: uniform_attention(v))
    torch.testing.assert_close(control, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(known_answers.stock_velocity(model, batch), whole, rtol=1e-5, atol=1e-5)


# -- all but the largest -----------------------------------------------------------------------------------------------


@chunk_sizes
def test_ratio_one_keeps_exactly_the_row_maxima(split_model, batch, backend, chunk):
    how = {"chunk": chunk, "backend": backend}
    largest = {
        layer: known_answers.watch(split_model, batch, layer, lambda q, k, v, call: known_answers.softmax64(q, k))
        for layer in (0, 2)
    }
    for weights in largest.values():  # no ties, so that one weight stays in each row
        top = weights.topk(2, dim=-1).values
        assert (top[..., 0] > top[..., 1] * 1.00001).all()
    want = everywhere(split_model, batch, winner)
    for limits in (pooled(1.0, **how), constant(math.inf), per_row(1.0, **how)):
        got, found = masked_velocity(split_model, batch, limits, **how)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        for realised, _ in found.values():
            torch.testing.assert_close(realised, torch.full_like(realised, 1 - 1 / TOKENS), rtol=1e-6, atol=0)
        dropped = 1 - largest[0].amax(dim=-1).mean(dim=-1)  # later blocks see other inputs
        torch.testing.assert_close(found[0][1], dropped, rtol=1e-5, atol=0)
    assert not torch.allclose(want, known_answers.velocity(split_model, batch), atol=1e-2)


STRENGTHS, SINK, PLANTED_TOKENS = (0.5, 2.0, 5.0, 8.0), 13, 31


@pytest.fixture
def planted(make_transformer, make_batch):
    """A model whose middle layer holds sinks of four strengths, all other weights of a row equal, and a batch."""
    model = make_transformer(5, num_attention_heads=4, pooled_projection_dim=16)
    known_answers.free_channels(model)
    for head, strength in enumerate(STRENGTHS):
        known_answers.write_head(model, (1, head), **known_answers.attracted(0, by=strength / 8.0), strength=8.0)
    vision, text = known_answers.marked(27, [[SINK]], 4)
    return SplitMochi(model), known_answers.coded_batch(make_batch, vision[None], text[None], (3, 3, 3))


@backends
def test_a_planted_sink_alone_is_left_and_the_closed_form_says_what_goes(planted, backend):
    split_model, batch = planted
    how = {"chunk": 6, "backend": backend}
    dropped = [1 - known_answers.sink_weight(strength, PLANTED_TOKENS) for strength in STRENGTHS]
    # The last ratio lies in the upper half of a row's last weight.
    for limits in (constant(math.inf), pooled(1.0, **how), per_row(1 - 0.5 / PLANTED_TOKENS, **how)):

        def measure(q, k, v, call, limits=limits):
            return masked_attention(q, k, v, limits(q, k), **how), v

        (out, realised, mass), v = known_answers.watch(split_model, batch, 1, measure)
        torch.testing.assert_close(out, v[:, :, SINK, None].expand_as(v), rtol=1e-6, atol=1e-7)
        assert realised[0].tolist() == pytest.approx([1 - 1 / PLANTED_TOKENS] * 4)
        assert mass[0].tolist() == pytest.approx(dropped, rel=1e-5)


@backends
def test_the_equal_weights_beside_a_planted_sink_tie_and_stay(planted, backend):
    split_model, batch = planted
    how = {"chunk": 6, "backend": backend}
    for ratio in (0.1, 0.75, 1 - 1.5 / PLANTED_TOKENS):
        got, found = masked_velocity(split_model, batch, per_row(ratio, **how), [1], **how)
        assert_nothing_removed(found)
        torch.testing.assert_close(got, known_answers.velocity(split_model, batch), rtol=1e-5, atol=1e-5)


# -- what is odd -------------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("text", [0, 1])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_a_single_vision_token(split_model, make_batch, text, ratio, backend):
    batch, how = make_batch((text, text), grid=(1, 2, 2)), {"chunk": 6, "backend": backend}
    stock = known_answers.stock_velocity(copy.deepcopy(split_model.transformer), batch)
    got, found = masked_velocity(split_model, batch, pooled(ratio, **how), **how)
    assert got.isfinite().all()
    if text == 0 or ratio == 0:
        torch.testing.assert_close(got, stock, rtol=1e-5, atol=1e-5)
        assert_nothing_removed(found)
    seen = known_answers.watch(
        split_model, batch, 1, lambda q, k, v, call: sink_statistics(q, k, v, num_vision=1, **how)
    )
    assert (seen.queries, seen.keys) == (1 + text, 1 + text)
    assert (seen.key == 0).all() and seen.value_norm_ratio.isnan().all()
    if text == 0:
        assert (seen.fraction == 1).all() and (seen.alpha == 1).all() and seen.text_alpha.abs().max() == 0


@backends
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_chunks_that_do_not_divide_the_tokens_and_a_brute_force(split_model, batch, layer, backend):
    def brute_force(q, k, v, call):
        weights = known_answers.softmax64(q, k)
        ordered = weights.flatten(2).sort(dim=-1).values
        middle = ordered.shape[-1] // 2  # below it lies half of them; between two weights rounding decides nothing
        limits.append((ordered[..., middle - 1] + ordered[..., middle]) / 2)
        removed = (weights < limits[0][..., None, None]) & (weights < weights.amax(dim=-1, keepdim=True))
        shares.append(removed.double().mean(dim=(-1, -2)))
        kept = weights.masked_fill(removed, 0.0)
        return (kept / kept.sum(dim=-1, keepdim=True) @ v.double()).float()

    limits, shares = [], []
    want = known_answers.velocity(split_model, batch, {layer: brute_force})
    assert not torch.allclose(want, known_answers.velocity(split_model, batch), atol=1e-4)
    for chunk in (1, 6, TOKENS - 1, TOKENS, 1000) if backend == "chunked" else (None,):
        for limit in (lambda q, k: limits[0].float(), pooled(0.5, backend=backend, chunk=chunk, rank_error=0.0)):
            got, found = masked_velocity(split_model, batch, limit, [layer], backend=backend, chunk=chunk)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[layer][0], shares[0], rtol=1e-6, atol=0)


@backends
@pytest.mark.parametrize("layer", [0, 2])
def test_rows_of_one_weight_whose_others_underflow(make_transformer, make_batch, layer, backend):
    model, tokens, sink = make_transformer(5, pooled_projection_dim=16), 31, 5
    known_answers.free_channels(model)
    for head in (0, 1):
        known_answers.write_head(
            model, (layer, head), **known_answers.attracted(0), strength=300.0
        )  # e^-300: 0 in float32
    vision, text = known_answers.marked(27, [[sink]], 4)
    batch = known_answers.coded_batch(make_batch, vision[None], text[None], (3, 3, 3))
    split_model, how = SplitMochi(model), {"chunk": 6, "backend": backend}

    def measure(q, k, v, call):
        seen = sink_statistics(q, k, v, num_vision=27, eps=(0.01, 0.999), **how)
        return row_statistics(q, k, **how), seen, pooled(0.5, **how)(q, k), v

    rows, seen, threshold, _ = known_answers.watch(split_model, batch, layer, measure)
    assert (rows.maximum == 1).all() and rows.entropy.abs().max() < 1e-30
    torch.testing.assert_close(rows.lse.double(), torch.full((1, 2, tokens), 300.0).double(), rtol=1e-6, atol=0)
    assert (seen.fraction == 1).all() and (seen.key == sink).all() and (seen.alpha == 1).all()
    assert threshold.max() < 1e-37
    # Removed or kept, what underflows changes nothing; in float32 all of it ties at 0 and stays.
    whole = known_answers.velocity(
        split_model, batch, {layer: lambda q, k, v, call: v[:, :, sink, None].expand_as(v).contiguous()}
    )
    torch.testing.assert_close(known_answers.stock_velocity(copy.deepcopy(model), batch), whole, rtol=1e-5, atol=1e-5)
    for ratio in (0.0, 0.5, 0.9):
        got, found = masked_velocity(split_model, batch, pooled(ratio, **how), [layer], **how)
        torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)
        assert found[layer][1].max() < 1e-37
        if backend == "chunked":
            assert_nothing_removed(found)
