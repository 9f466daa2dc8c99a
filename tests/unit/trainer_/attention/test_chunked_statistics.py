"""Row and key statistics: the float64 reference, closed forms, lengths, very peaked rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention_draws import DTYPES, draw_heads, heads_strategy, lengths_of, planted_sink
from trainer.attention import EPS, key_statistics, row_statistics
from trainer.attention import dense as reference


@settings(max_examples=80, deadline=None)
@given(heads_strategy, st.integers(1, 50), st.booleans())
def test_row_statistics_agree_with_the_float64_reference(drawn, chunk, padded):
    q, k, _ = draw_heads(*drawn)
    lengths = lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    got = row_statistics(q, k, lengths=lengths, chunk=chunk)
    lse, maximum, entropy = reference.row_statistics(q, k, lengths)
    assert {t.dtype for t in (got.lse, got.maximum, got.entropy)} == {torch.float32}
    torch.testing.assert_close(got.lse.double(), lse, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(got.maximum.double(), maximum, rtol=1e-4, atol=1e-30)
    torch.testing.assert_close(got.entropy.double(), entropy, rtol=1e-4, atol=2e-5)


@settings(max_examples=100, deadline=None)
@given(heads_strategy, st.integers(1, 50), st.booleans(), st.sampled_from([EPS, (0.5, 0.001, 0.02), (0.0,), ()]))
def test_key_statistics_agree_with_the_float64_reference(drawn, chunk, padded, eps):
    q, k, _ = draw_heads(*drawn)
    lengths = lengths_of(drawn[1], q.shape[0], q.shape[2]) if padded else None
    mass, counts = key_statistics(q, k, eps=eps, lengths=lengths, chunk=chunk)
    weights = reference.attention_weights(q, k, lengths)
    true_mass, true_counts = reference.key_statistics(weights, eps)
    assert (mass.dtype, counts.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(mass.double(), true_mass, rtol=1e-4, atol=1e-35)
    # Rounding may decide only where a weight lies within 1e-6 of eps.
    near = torch.stack([((weights - e).abs() < 1e-6).sum(dim=-2) for e in eps], dim=2) if eps else 0
    assert ((counts - true_counts).abs() <= near).all()


def test_the_reference_is_the_definition_written_out():
    q, k, _ = draw_heads("random", 4, 1, 1, 6, 16)
    length, eps = 5, 0.2
    lse, maximum, entropy = (t[0, 0].tolist() for t in reference.row_statistics(q, k, [length]))
    mass, counts = (
        t[0, 0].tolist() for t in reference.key_statistics(reference.attention_weights(q, k, [length]), [eps])
    )
    received, heavy = [0.0] * 6, [0] * 6
    for i in range(length):
        scores = [sum(a * b for a, b in zip(q[0, 0, i].tolist(), k[0, 0, j].tolist(), strict=True)) / 4
                  for j in range(length)]  # fmt: skip
        total = sum(math.exp(s) for s in scores)
        row = [math.exp(s) / total for s in scores]
        assert lse[i] == pytest.approx(math.log(total), abs=1e-6)
        assert maximum[i] == pytest.approx(max(row))
        assert entropy[i] == pytest.approx(-sum(p * math.log(p) for p in row))
        received = [r + (row[j] if j < length else 0.0) for j, r in enumerate(received)]
        heavy = [n + (j < length and row[j] > eps) for j, n in enumerate(heavy)]
    assert mass == pytest.approx(received) and counts[0] == heavy
    assert lse[5] == maximum[5] == entropy[5] == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("logit", [0.5, 3.0, 6.0, 10.0])
@pytest.mark.parametrize("tokens, width", [(1, 16), (37, 64), (300, 128)])
def test_planted_sink_has_its_closed_form_in_every_dtype(dtype, logit, tokens, width):
    sink = tokens // 3
    # sqrt(128) is no bfloat16 number: with q a power of two, every logit is exact.
    q, k = (t.to(dtype) for t in planted_sink(1, 1, tokens, width, sink=sink, logit=logit))
    strength = float(q[0, 0, 0, 0]) * float(k[0, 0, sink, 0]) / math.sqrt(width)
    closed = math.exp(strength) / (math.exp(strength) + tokens - 1)
    rows = row_statistics(q, k, chunk=16)
    mass, counts = key_statistics(q, k, eps=(closed * 0.99, closed * 1.01), chunk=16)
    torch.testing.assert_close(rows.maximum[0, 0].double(), torch.full((tokens,), closed).double(), rtol=1e-5, atol=0)
    assert float(rows.lse[0, 0, 0]) == pytest.approx(math.log(math.exp(strength) + tokens - 1), rel=1e-6)
    other = (1 - closed) / max(tokens - 1, 1)
    expected = -closed * math.log(closed) - ((tokens - 1) * other * math.log(other) if tokens > 1 else 0.0)
    assert float(rows.entropy[0, 0, 0]) == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert float(mass[0, 0, sink]) == pytest.approx(tokens * closed, rel=1e-5)
    assert counts[0, 0, :, sink].tolist() == [tokens, 0]


def test_rows_of_one_weight_and_underflow():
    q, k, _ = draw_heads("peaked", 3, 1, 2, 40, 64)
    rows = row_statistics(q, k, chunk=9)
    mass, counts = key_statistics(q, k, eps=EPS, chunk=9)
    assert torch.equal(rows.maximum, torch.ones(1, 2, 40)) and rows.entropy.abs().max() == 0
    assert torch.equal(mass, torch.ones(1, 2, 40)) and (counts == 1).all()
    assert torch.isfinite(rows.lse).all()


def test_uniform_rows_have_the_largest_entropy():
    q, k, _ = draw_heads("uniform", 3, 1, 2, 40, 64)
    rows = row_statistics(q, k, chunk=9)
    torch.testing.assert_close(rows.entropy, torch.full((1, 2, 40), math.log(40)))
    torch.testing.assert_close(rows.lse, torch.full((1, 2, 40), math.log(40)))


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("least", [0.2, 0.001])  # heavy weights are rare, or are not
def test_eps_exactly_hit_does_not_count(backend, least):
    four = torch.zeros(1, 1, 4, 16)  # weights of exactly 1/4
    counts = key_statistics(four, four, eps=(0.25, 0.2499, least), backend=backend)[1]
    assert counts[0, 0, :, 0].tolist() == [0, 4, 4]


def test_lengths_equal_each_sample_alone():
    q, k, _ = draw_heads("sharp", 8, 2, 3, 31, 16)
    q[0, :, 20:], k[0, :, 20:] = 1e4, 1e4  # what lies behind may be anything
    lengths = torch.tensor([20, 31])
    rows = row_statistics(q, k, lengths=lengths, chunk=8)
    mass, counts = key_statistics(q, k, eps=EPS, lengths=lengths, chunk=8)
    assert rows.lse[0, :, 20:].abs().max() == mass[0, :, 20:].abs().max() == counts[0, ..., 20:].max() == 0
    for sample, length in enumerate(lengths.tolist()):
        own = slice(sample, sample + 1)
        alone = row_statistics(q[own, :, :length], k[own, :, :length])
        for name in ("lse", "maximum", "entropy"):
            torch.testing.assert_close(getattr(rows, name)[own, :, :length], getattr(alone, name))
        alone_mass, alone_counts = key_statistics(q[own, :, :length], k[own, :, :length], eps=EPS)
        torch.testing.assert_close(mass[own, ..., :length], alone_mass)
        assert torch.equal(counts[own, ..., :length], alone_counts)


@pytest.mark.parametrize("lengths", [[0, 3], [3, 6], [3], [1.0, 2.0], [True, True]])
def test_wrong_lengths_are_named(lengths):
    q, k, _ = draw_heads("random", 0, 2, 1, 5, 16)
    with pytest.raises(ValueError, match="got lengths"):
        row_statistics(q, k, lengths=lengths)


def test_faults_are_named():
    q, k, _ = draw_heads("random", 0, 2, 1, 5, 16)
    with pytest.raises(ValueError, match="got lengths"):
        key_statistics(q[:, :, :3], k, eps=EPS, lengths=[3, 3])
    with pytest.raises(ValueError, match="got lse"):
        key_statistics(q, k, eps=EPS, lse=torch.zeros(2, 1, 4))
    with pytest.raises(ValueError, match="got q of shape"):
        row_statistics(q[0], k[0])
    for call in (row_statistics, lambda *a, **o: key_statistics(*a, eps=EPS, **o)):
        with pytest.raises(ValueError, match="got backend 'fast'"):
            call(q, k, backend="fast")
