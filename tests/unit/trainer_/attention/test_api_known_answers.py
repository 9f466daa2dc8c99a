"""The engine inside whole Mochi models, of drawn shapes and distributions, against a float64 softmax.

What rounding may decide is counted: weights within 1e-6 of eps for counts, within 1e-5 of a threshold, relatively, for
ranks and masks. Everything else has to be equal.

Legend: B batch, N tokens ([vision | text]), h heads, d head width, E eps values, R ratios.
"""

import functools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import known_answers
from trainer.attention import dense as reference
from trainer.attention import (
    key_statistics,
    masked_attention,
    pooled_quantiles,
    row_quantiles,
    row_statistics,
    sink_statistics,
    sink_verdict,
)
from trainer.models.mochi import SplitMochi

RATIOS = (0.0, 0.1, 0.3, 0.5, 0.9, 0.99, 1.0)
EPS = (0.3, 0.01, 0.05, 0.5, 0.1)
#: Share of a threshold, and least weight, that float32 cannot tell from it.
_SAME, _NOTHING = 1e-5, 1e-36
#: By which the Triton back end lowers the thresholds of rows, as a share of themselves (`Triton.row_quantiles`).
LOWERED = 2.0**-17
KINDS = ("own", "normal", "heavy", "constant", "peaked", "ties", "bfloat16", "float16")

backends = pytest.mark.parametrize("backend", known_answers.BACKENDS)
shapes = st.fixed_dictionaries(
    {
        "heads": st.integers(1, 3),
        "width": st.sampled_from([8, 64, 128]),
        "grid": st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
        "lengths": st.one_of(
            st.lists(st.integers(0, 6), min_size=1, max_size=3),
            st.builds(lambda length, samples: [length] * samples, st.integers(0, 6), st.integers(1, 3)),
        ),
    }
)


def attention_of(kind: str, seed: int, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What takes the place of a forward's q and k, (B, h, N, d), to give them the named distribution."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(q.shape, generator=generator) for _ in range(2)]
    if kind == "own":
        return q, k
    if kind in ("bfloat16", "float16"):
        return q.to(getattr(torch, kind)), k.to(getattr(torch, kind))
    if kind == "constant":
        return torch.ones_like(q), torch.ones_like(k)
    signs = [torch.where(part > 0, 1.0, -1.0) for part in drawn]
    if kind == "peaked":  # each query is far ahead with its own key, or with keys equal to it
        return signs[0] * 1024, signs[0]
    if kind == "ties":  # logits are few multiples of one number
        return signs[0] * (torch.arange(q.shape[-1]) < 4), signs[1]
    if kind == "heavy":  # ratios of normals
        drawn = [part / torch.randn(q.shape, generator=generator).abs().clamp(min=0.05) for part in drawn]
    # A float32 logit is as wrong as the sum of its products' sizes is large, and a weight as its logit.
    largest = (drawn[0].double().abs() @ drawn[1].double().abs().mT).max() / math.sqrt(q.shape[-1])
    return drawn[0] * min(1.0, float(15 / largest)), drawn[1]


@functools.lru_cache(maxsize=9)
def split_model_of(make_transformer, heads, width):
    model = make_transformer(heads, num_layers=2, num_attention_heads=heads, attention_head_dim=width)
    return SplitMochi(model)


def observed(make_transformer, make_batch, shape, kind, seed, layer, measure):
    """measure(q, k, v, vision, lengths) in one layer of a whole forward, whose output goes on as masked attention."""
    frames, height, width = shape["grid"]
    split_model = split_model_of(make_transformer, shape["heads"], shape["width"])
    batch = make_batch(shape["lengths"], grid=(frames, 2 * height, 2 * width), seed=seed)
    called = []

    def attend(q, k, v, call):
        q, k = attention_of(kind, seed, q, k)
        vision = call.layout.num_vision
        lengths = None if call.layout.key_mask is None else [vision + length for length in shape["lengths"]]
        assert q.shape[2] == vision + max(shape["lengths"])
        called.append(layer)
        return measure(q, k, v, vision, lengths).to(v.dtype)

    assert known_answers.velocity(split_model, batch, {layer: attend}).isfinite().all()
    assert called == [layer]


def valid_weights(q, k, lengths):
    """Per sample its weights (h, n, n), n its valid tokens, float64."""
    for sample, length in enumerate([q.shape[2]] * len(q) if lengths is None else lengths):
        own = slice(sample, sample + 1)
        yield sample, length, known_answers.softmax64(q[own, :, :length], k[own, :, :length])[0]


def near_equal(got, want, rtol, atol=1e-35):
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@backends
@known_answers.DRAWN
@given(shapes, st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(0, 1), st.integers(1, 60))
def test_statistics(make_transformer, make_batch, backend, shape, kind, seed, layer, chunk):
    def measure(q, k, v, vision, lengths):
        how = {"lengths": lengths, "backend": backend, "chunk": chunk}
        rows = row_statistics(q, k, **how)
        mass, counts = key_statistics(q, k, eps=EPS, **how)
        for sample, length, weights in valid_weights(q, k, lengths):
            assert (weights.sum(dim=-1) - 1).abs().max() < 1e-12
            near_equal(rows.maximum[sample, :, :length], weights.amax(dim=-1), 1e-4)
            entropy = -(weights * weights.clamp(min=1e-300).log()).sum(dim=-1)
            near_equal(rows.entropy[sample, :, :length], entropy, 1e-4, 5e-5)
            near_equal(mass[sample, :, :length], weights.sum(dim=1), 1e-4)
            for index, eps in enumerate(EPS):
                least, most = ((weights > eps + side * 1e-6).sum(dim=1) for side in (1, -1))
                got = counts[sample, :, index, :length]
                assert ((least <= got) & (got <= most)).all()
            assert not mass[sample, :, length:].any() and not counts[sample, ..., length:].any()
        if lengths is None:
            check_sinks(q, k, v, vision, counts, mass)
        return masked_attention(q, k, v, torch.zeros(q.shape[:2]), **how)[0]

    def check_sinks(q, k, v, vision, counts, mass):
        seen = sink_statistics(q, k, v, num_vision=vision, eps=EPS, backend=backend, chunk=chunk)
        tokens = q.shape[2]
        most = counts[..., :vision].amax(dim=-1)
        assert torch.equal(seen.fraction.float(), most.float() / tokens)
        assert torch.equal(sink_verdict(seen.fraction), 2 * most > tokens)
        assert torch.equal(counts.gather(-1, seen.key[..., None])[..., 0], most)
        among = mass[:, :, None, :vision].where(counts[..., :vision] == most[..., None], -1.0)
        near_equal(among.gather(-1, seen.key[..., None])[..., 0], among.amax(dim=-1).double(), 1e-6)
        near_equal(seen.alpha, mass[..., :vision].amax(dim=-1).double() / tokens, 1e-6)
        if vision < tokens:
            assert torch.equal(seen.text_fraction.float(), counts[..., vision:].amax(dim=-1).float() / tokens)

    observed(make_transformer, make_batch, shape, kind, seed, layer, measure)


def check_rank(pool, threshold, ratio, error, counted=False, lowered=0.0):
    """At most a share r of the pool (h, n) lies below the threshold (h,), and above r - error, but for ties.

    Counted thresholds (Triton's) lie anywhere between two weights, and err by as much on the other side too. A
    threshold that is lowered by a share of itself on purpose has its weight at or below where it stood before.
    """
    total, threshold = pool.shape[-1], threshold.double()[:, None]
    rank = min(math.floor(Fraction(str(ratio)) * total), total - 1)
    below = (pool < threshold * (1 - _SAME) - _NOTHING).sum(dim=-1)
    not_above = (pool <= threshold / (1 - lowered) * (1 + _SAME) + _NOTHING).sum(dim=-1)
    assert (below <= rank + counted * error * total).all(), (ratio, below, rank)
    assert (not_above >= min(rank + 1, total) - counted - error * total).all(), (ratio, not_above, rank)


@backends
@known_answers.DRAWN
@given(
    shapes, st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(0, 1), st.integers(1, 60), st.booleans(),
    st.sampled_from([0.0, 1e-3, 0.02]),
)  # fmt: skip
def test_thresholds(make_transformer, make_batch, backend, shape, kind, seed, layer, chunk, only_vision, error):
    def measure(q, k, v, vision, lengths):
        how = {"num_keys": vision if only_vision else None, "chunk": chunk, "backend": backend}
        found = pooled_quantiles(q, k, RATIOS, lengths=lengths, rank_error=error, **how)
        rows = row_quantiles(q, k, RATIOS, **how) if lengths is None else None
        for sample, _, weights in valid_weights(q, k, lengths):
            pool = weights[..., : how["num_keys"]]
            for index, ratio in enumerate(RATIOS):
                if backend == "triton" and ratio == 0:  # nothing lies below 0, whatever the least weight is
                    assert not found[sample, :, index].any()
                else:
                    check_rank(pool.flatten(1), found[sample, :, index], ratio, error, backend == "triton")
                if rows is not None:
                    lowered = LOWERED if backend == "triton" else 0.0
                    check_rank(pool.flatten(0, 1), rows[sample, ..., index].flatten(), ratio, 0.0, lowered=lowered)
        middle = found[..., RATIOS.index(0.5)]
        return masked_attention(q, k, v, middle, lengths=lengths, **how)[0]

    observed(make_transformer, make_batch, shape, kind, seed, layer, measure)


@backends
@known_answers.DRAWN
@given(
    shapes, st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(0, 1), st.integers(1, 60), st.booleans(),
    st.sampled_from(RATIOS[1:]),
)  # fmt: skip
def test_masks(make_transformer, make_batch, backend, shape, kind, seed, layer, chunk, only_vision, ratio):
    def measure(q, k, v, vision, lengths):
        how = {"num_keys": vision if only_vision else None, "lengths": lengths, "chunk": chunk, "backend": backend}
        # A little under the order statistic, so that it and its ties stay whatever their last bit.
        thresholds = pooled_quantiles(q, k, (ratio,), **how)[..., 0].float() * 0.999
        out, realised, dropped = masked_attention(q, k, v, thresholds, **how)
        for sample, length, weights in valid_weights(q, k, lengths):
            limit = thresholds[sample].double()[:, None, None]
            removable = weights < weights.amax(dim=-1, keepdim=True)
            removable[..., how["num_keys"] or length :] = False
            total = weights[0, :, : how["num_keys"]].numel()
            sure = removable & (weights < limit * (1 - _SAME) - _NOTHING)
            perhaps = (weights < limit * (1 + _SAME) + _NOTHING) & ~sure
            perhaps[..., how["num_keys"] or length :] = False
            least, most = sure.sum(dim=(1, 2)) / total, (sure | perhaps).sum(dim=(1, 2)) / total
            share, mass = realised[sample].double(), dropped[sample].double()
            assert ((least - 1e-6 <= share) & (share <= most + 1e-6)).all()
            assert (share <= ratio + 1e-6).all()
            lost = (weights * sure).sum(dim=-1).mean(dim=-1)
            more = (weights * (sure | perhaps)).sum(dim=-1).mean(dim=-1)
            assert ((lost * 0.999 - 1e-9 <= mass) & (mass <= more * 1.001 + 1e-9)).all()
            kept = weights.masked_fill(sure, 0.0)
            want = kept / kept.sum(dim=-1, keepdim=True) @ v[sample, :, :length].double()
            # Heads with a weight that rounding may put on either side, and that matters, are left to the bounds above.
            clear = (weights * perhaps).sum(dim=(1, 2)) < 1e-9
            near_equal(out[sample, clear, :length], want[clear], 1e-4, 2e-5)
            assert not out[sample, :, length:].any()
        return out

    observed(make_transformer, make_batch, shape, kind, seed, layer, measure)


@settings(max_examples=20, deadline=None)
@given(shapes, st.sampled_from(KINDS), st.integers(0, 10_000), st.integers(0, 1))
def test_the_engines_own_reference_is_this_softmax(make_transformer, make_batch, shape, kind, seed, layer):
    def measure(q, k, v, vision, lengths):
        truth = reference.attention_weights(q, k, lengths)
        for sample, length, weights in valid_weights(q, k, lengths):
            near_equal(truth[sample, :, :length, :length], weights, 1e-9, 1e-300)
            assert truth[sample].sum().item() == pytest.approx(len(weights) * length, rel=1e-12)
        return truth @ v.double()

    observed(make_transformer, make_batch, shape, kind, seed, layer, measure)
