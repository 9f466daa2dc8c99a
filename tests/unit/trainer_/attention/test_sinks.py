"""Sink statistics: the float64 reference, closed forms of planted sinks, and decoys in both back ends."""

import math

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from trainer.attention import EPS, sink_statistics, sink_verdict, through_projection
from trainer.attention import dense as reference

AT_DEFAULT = EPS.index(0.3)


def from_weights(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k whose attention weights are exactly `weights` (N, N): q = log A * sqrt(N), k = identity; one head."""
    tokens = weights.shape[0]
    q = weights.clamp(min=1e-30).log() * math.sqrt(tokens)
    return q[None, None], torch.eye(tokens)[None, None]


def attend_to(shares: dict[int, list[int]], tokens: int, heavy: float) -> torch.Tensor:
    """A (N, N): row i puts `heavy` on each key that lists it and spreads the rest over the other keys."""
    weights = torch.zeros(tokens, tokens)
    for key, rows in shares.items():
        weights[rows, key] = heavy
    rest = (weights == 0).float()
    return weights + rest * (1 - weights.sum(1, keepdim=True)) / rest.sum(1, keepdim=True)


def measure(weights: torch.Tensor, num_vision: int, **kwargs):
    """Chunked sink statistics, after the dense ones came to the same verdict."""
    q, k = from_weights(weights)
    v = torch.randn(k.shape)
    got = sink_statistics(q, k, v, num_vision=num_vision, backend="chunked", chunk=7, **kwargs)
    dense = sink_statistics(q, k, v, num_vision=num_vision, backend="dense", **kwargs)
    for name in ("fraction", "key", "text_fraction", "alpha_key"):
        assert torch.equal(getattr(got, name), getattr(dense, name)), name
    return got


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000), batch=st.integers(1, 3), heads=st.integers(1, 3), vision=st.integers(1, 20),
    text=st.integers(0, 5), scale=st.sampled_from([0.0, 0.3, 2.0, 20.0]), chunk=st.integers(1, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_agrees_with_the_float64_reference(seed, batch, heads, vision, text, scale, chunk, dtype):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, vision + text, 8, generator=generator).to(dtype) for _ in range(3))
    q = q * scale
    projection = torch.randn(heads, 8, 12, generator=generator)
    weights = reference.attention_weights(q, k)
    if any((weights - e).abs().min() < 1e-6 for e in EPS):  # rounding would decide; the exact cases are below
        reject()
    got = sink_statistics(q, k, v, num_vision=vision, projection=projection, chunk=chunk)

    heavy = reference.heavy_fractions(weights, EPS)
    torch.testing.assert_close(got.fraction.double(), heavy[:, :, :vision].amax(2), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(heavy.gather(2, got.key[:, :, None])[:, :, 0], heavy[:, :, :vision].amax(2))
    alpha = reference.alpha(weights)
    torch.testing.assert_close(got.alpha.double(), alpha[..., :vision].amax(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alpha.gather(2, got.alpha_key[..., None])[..., 0], alpha[..., :vision].amax(-1),
                               rtol=1e-5, atol=1e-6)  # fmt: skip
    assert got.key.max() < vision and got.alpha_key.max() < vision
    if text:
        torch.testing.assert_close(got.text_fraction.double(), heavy[:, :, vision:].amax(2), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(got.text_alpha.double(), alpha[..., vision:].amax(-1), rtol=1e-5, atol=1e-6)
    else:
        assert got.text_fraction.abs().max() == 0 and got.text_alpha.abs().max() == 0
    assert (got.queries, got.keys) == (vision + text, vision + text)
    if vision > 1:
        norms = v.double()[:, :, :vision].norm(dim=-1)
        truth = reference.value_norm_ratio(norms, got.alpha_key)
        torch.testing.assert_close(got.value_norm_ratio.double(), truth, rtol=1e-4, atol=1e-6)
        norms = (v.double() @ projection.double())[:, :, :vision].norm(dim=-1)
        truth = reference.value_norm_ratio(norms, got.alpha_key)
        torch.testing.assert_close(got.projected_value_norm_ratio.double(), truth, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("logit", [2.0, 5.0, 9.0])
def test_planted_sink_has_its_closed_form(logit):
    # Every query parallel to e1; the sink's key is e1, all others e2: a = e^L / (e^L + N - 1), L = g_q g_k sqrt(d).
    tokens, width, sink = 40, 16, 7
    gain = (logit / math.sqrt(width)) ** 0.5 * math.sqrt(width)  # both q and k, so that q . k / sqrt(d) = L
    q, k = torch.zeros(1, 1, tokens, width), torch.zeros(1, 1, tokens, width)
    q[..., 0] = gain
    k[..., 1] = gain
    k[0, 0, sink, :2] = torch.tensor([gain, 0.0])
    v = torch.ones(1, 1, tokens, 4)
    v[0, 0, sink] = 0.25
    got = sink_statistics(q, k, v, num_vision=tokens)
    closed = math.exp(logit) / (math.exp(logit) + tokens - 1)
    assert got.alpha.item() == pytest.approx(closed, rel=1e-5)
    assert got.alpha_key.item() == sink
    assert got.value_norm_ratio.item() == pytest.approx(0.25)
    assert got.fraction[0, 0].tolist() == [float(closed > e) for e in EPS]
    assert all(got.key[0, 0, i] == sink for i, e in enumerate(EPS) if closed > e)


@pytest.mark.parametrize("rows, expected", [(49, False), (50, False), (51, True)])
def test_over_half_of_the_queries_decide(rows, expected):
    got = measure(attend_to({3: list(range(rows))}, 100, 0.6), 100)
    assert got.fraction[0, 0, AT_DEFAULT] == pytest.approx(rows / 100)
    assert bool(sink_verdict(got.fraction)[0, 0, AT_DEFAULT]) is expected
    assert got.key[0, 0, AT_DEFAULT] == 3


def test_two_half_mass_keys_both_count_and_the_larger_alpha_names_the_key():
    everyone = list(range(30))
    weights = attend_to({4: everyone, 11: everyone}, 30, 0.45)
    weights[:, 4] += 0.01
    weights[:, 11] -= 0.01
    got = measure(weights, 30)
    assert sink_verdict(got.fraction)[0, 0].tolist() == [True, True, True, True, False]
    assert got.key[0, 0, AT_DEFAULT] == 4 and got.alpha_key[0, 0] == 4
    split = attend_to({4: everyone[:15], 11: everyone[15:]}, 30, 0.9)
    assert not sink_verdict(measure(split, 30).fraction)[0, 0, AT_DEFAULT]  # half the queries each: no single key


def test_text_sink_is_reported_apart():
    weights = attend_to({25: list(range(30))}, 30, 0.9)
    got = measure(weights, 25)  # tokens 25.. are text
    assert not sink_verdict(got.fraction).any()
    assert got.text_fraction[0, 0].tolist() == [1.0] * len(EPS)
    assert got.text_alpha.item() == pytest.approx(0.9, rel=1e-5)
    assert got.alpha_key.item() < 25


def test_text_queries_count_as_queries():
    # 26 of 50 tokens attend to the key, only 6 of them vision tokens.
    got = measure(attend_to({0: list(range(24, 50))}, 50, 0.6), 30)
    assert got.fraction[0, 0, AT_DEFAULT] == pytest.approx(26 / 50)


def test_diagonal_head_has_no_sink():
    got = measure(attend_to({i: [i] for i in range(20)}, 20, 0.95), 20)
    assert not sink_verdict(got.fraction).any()
    assert got.fraction[0, 0].tolist() == pytest.approx([1 / 20] * len(EPS))


def test_uniform_head_has_a_sink_only_where_the_weight_itself_is_above_eps():
    got = measure(torch.full((20, 20), 1 / 20), 20, eps=(0.04, 0.06))
    assert got.fraction[0, 0].tolist() == [1.0, 0.0]
    four = torch.zeros(1, 1, 4, 2)  # weights of exactly 1/4: not above 1/4
    assert sink_statistics(four, four, four, num_vision=4, eps=(0.25,)).fraction.item() == 0.0


def test_high_value_sink_shows_in_the_ratio_and_the_projection_can_turn_it_round():
    q, k = from_weights(attend_to({2: list(range(10))}, 10, 0.8))
    v = torch.ones(1, 1, 10, 2) * torch.tensor([1.0, 0.0])
    v[0, 0, 2] = torch.tensor([0.0, 8.0])
    projection = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.01, 0.0]]])  # the sink's direction is hardly read
    got = sink_statistics(q, k, v, num_vision=10, projection=projection)
    assert got.value_norm_ratio.item() == pytest.approx(8.0)
    assert got.projected_value_norm_ratio.item() == pytest.approx(0.08)


def test_single_token():
    one = torch.ones(2, 3, 1, 4)
    got = sink_statistics(one, one, one, num_vision=1)
    assert (got.fraction == 1).all() and (got.alpha == 1).all() and got.value_norm_ratio.isnan().all()
    assert got.projected_value_norm_ratio is None


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_lengths_equal_each_sample_alone(backend):
    q, k, v = (torch.randn(3, 2, 21, 8, generator=torch.Generator().manual_seed(seed)) * 2 for seed in range(3))
    lengths, projection = [21, 17, 16], torch.randn(2, 8, 12)  # the last without text
    for t in (q, k, v):
        t[1, :, 17:] = t[2, :, 16:] = 1e4  # what lies behind may be anything
    how = {"num_vision": 16, "projection": projection, "backend": backend, "chunk": 4}
    got = sink_statistics(q, k, v, lengths=torch.tensor(lengths), **how)
    for sample, length in enumerate(lengths):
        alone = sink_statistics(*(t[sample : sample + 1, :, :length] for t in (q, k, v)), **how)
        for name in ("fraction", "key", "text_fraction", "alpha", "alpha_key", "text_alpha", "value_norm_ratio",
                     "projected_value_norm_ratio"):  # fmt: skip
            torch.testing.assert_close(getattr(got, name)[sample], getattr(alone, name)[0], msg=name)
    with pytest.raises(ValueError, match=r"got num_vision 17 for samples of \[21, 17, 16\] tokens"):
        sink_statistics(q, k, v, lengths=lengths, **how | {"num_vision": 17})


def test_chunk_size_does_not_change_results():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 45, 8, generator=generator) * 2 for _ in range(3))
    dense = sink_statistics(q, k, v, num_vision=40)
    for chunk in (1, 7, 44):
        got = sink_statistics(q, k, v, num_vision=40, chunk=chunk)
        for name in ("fraction", "key", "text_fraction", "alpha_key"):
            assert torch.equal(getattr(got, name), getattr(dense, name)), name
        torch.testing.assert_close(got.alpha, dense.alpha, rtol=1e-6, atol=0)


@pytest.mark.parametrize("width_out", [3, 8, 40])
def test_projected_norms_equal_the_product(width_out):
    v, projection = torch.randn(2, 3, 11, 8), torch.randn(3, 8, width_out)
    torch.testing.assert_close(through_projection(v, projection), (v @ projection).norm(dim=-1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_vision", [0, 6])
def test_wrong_vision_count_is_named(num_vision):
    one = torch.ones(1, 1, 5, 4)
    with pytest.raises(ValueError, match="got num_vision"):
        sink_statistics(one, one, one, num_vision=num_vision)
