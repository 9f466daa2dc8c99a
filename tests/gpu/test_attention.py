"""The Triton back end against the dense float64 reference: compiled on a GPU, or interpreted (TRITON_INTERPRET=1).

Legend: B batch, N tokens, h heads, d head width.
"""

import math
import os

import pytest
import torch

from trainer.attention import dense as reference
from trainer.attention import (
    key_statistics,
    layer_statistics,
    log_histogram,
    masked_attention,
    pooled_quantiles,
    row_statistics,
    sink_statistics,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"
    ),
]
EPS = (0.3, 0.01, 0.05, 0.5, 0.1)
RATIOS = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
#: N, h, d: not multiples of a tile; the head widths of Mochi and CogVideoX; one token.
SIZES = [(70, 2, 64), (33, 1, 128), (1, 1, 64), (64, 1, 24)] + ([] if INTERPRETED else [(1111, 3, 128), (2048, 2, 64)])


def heads(n, h, d, dtype=torch.float32, batch=2, scale=1.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(batch, h, n, d, generator=generator) * scale).to(DEVICE, dtype) for _ in range(3)]


def near(weights, values, within=1e-6):
    """Number of weights so close to a value that rounding may put them on either side."""
    return sum(int((weights - value).abs().lt(within * max(value, 1e-12)).sum()) for value in values)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows(size, dtype):
    q, k, _ = heads(*size, dtype)
    found = row_statistics(q, k, backend="triton")
    lse, maximum, entropy = reference.row_statistics(q, k)
    torch.testing.assert_close(found.lse.double(), lse, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.maximum.double(), maximum, rtol=2e-5, atol=0)
    torch.testing.assert_close(found.entropy.double(), entropy, rtol=0, atol=5e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [False, True])
def test_keys(size, dtype, lengths):
    q, k, _ = heads(*size, dtype)
    valid = [size[0], max(1, size[0] - 7)] if lengths else None
    mass, counts = key_statistics(q, k, eps=EPS, lengths=valid, backend="triton")
    weights = reference.attention_weights(q, k, None if valid is None else torch.tensor(valid, device=DEVICE))
    want_mass, want_counts = reference.key_statistics(weights, EPS)
    torch.testing.assert_close(mass.double(), want_mass, rtol=1e-4, atol=1e-7)
    assert (counts - want_counts).abs().sum() <= near(weights, EPS, 2e-5)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bins", [1, 20])
@pytest.mark.parametrize("lengths", [False, True])
def test_histograms(size, bins, lengths):
    q, k, _ = heads(*size)
    valid = [size[0], max(1, size[0] - 7)] if lengths else None
    q[0, 0, 0] = math.nan  # counts in the first bin
    found = log_histogram(q, k, bins=bins, lowest=1e-8, lengths=valid, backend="triton")
    weights = reference.attention_weights(q, k, None if valid is None else torch.tensor(valid, device=DEVICE))
    want = reference.log_histogram(weights, bins=bins, lowest=1e-8, lengths=valid)
    assert torch.equal(found.sum(-1), want.sum(-1)) and found.dtype == torch.int64
    edges = torch.logspace(-8, 0, bins + 1, dtype=torch.float64)[1:-1].tolist()
    assert (found - want).abs().sum() <= 2 * near(weights, edges, 2e-5)


@pytest.mark.parametrize("h, d", [(24, 128), (12, 128), (40, 128), (30, 64), (48, 64)])
def test_the_heads_and_widths_of_the_model_families(h, d):
    q, k, v = heads(17, h, d, torch.bfloat16, batch=1)
    mass, counts = key_statistics(q, k, eps=(0.3,), backend="triton")
    weights = reference.attention_weights(q, k)
    torch.testing.assert_close(mass.double(), weights.sum(2), rtol=1e-4, atol=1e-7)
    assert (counts - reference.key_statistics(weights, (0.3,))[1]).abs().sum() <= near(weights, (0.3,), 2e-5)
    out = masked_attention(q, k, v, torch.zeros(1, h, device=DEVICE), backend="triton")[0]
    torch.testing.assert_close(out.double(), weights @ v.double(), rtol=2e-2, atol=2e-2)


def test_counts_are_exact_where_weights_are_far_from_eps():
    q, k, v = heads(70, 2, 64)
    q, k = q * 0, k * 0
    k[:, :, 5, 0] = 10.0
    q[:, :, :40, 0] = 10.0  # 40 of 70 queries attend to key 5
    for backend in ("triton", "dense"):
        found = sink_statistics(q, k, v, num_vision=60, backend=backend)
        assert found.key[..., 3].eq(5).all() and torch.allclose(found.fraction[..., 3].float(), torch.tensor(40 / 70))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("error", [1e-2, 1e-3])
def test_quantiles_keep_their_rank_error(size, error):
    q, k, _ = heads(*size)
    for num_keys in {size[0], max(1, size[0] - 9)}:
        found = pooled_quantiles(q, k, RATIOS, num_keys=num_keys, backend="triton", rank_error=error)
        weights = reference.attention_weights(q, k)[..., :num_keys].flatten(2)
        total, slack = weights.shape[-1], 2  # weights that rounding may put on either side
        for index, ratio in enumerate(RATIOS):
            below = (weights < found[..., index, None].double()).sum(-1)
            if ratio == 1.0:
                assert (below >= total - slack - (weights > 0.99999 * weights.amax(-1, keepdim=True)).sum(-1)).all()
            else:
                assert ((below - ratio * total).abs() <= error * total + slack).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", [{}, {"num_keys": 20}, {"lengths": [-3, 0]}])
def test_a_layer_at_once_is_as_its_parts(size, options):
    q, k, _ = heads(*size)
    lengths = [max(1, size[0] + less) for less in options["lengths"]] if "lengths" in options else None
    keys = min(size[0], options.get("num_keys", size[0]))
    wanted = {"num_keys": keys, "lengths": lengths, "backend": "triton", "rank_error": 1e-2}
    found = layer_statistics(q, k, eps=EPS, ratios=RATIOS, **wanted)
    rows = row_statistics(q, k, lengths=lengths, backend="triton")
    mass, counts = key_statistics(q, k, eps=EPS, lengths=lengths, backend="triton")
    assert torch.equal(found.rows.lse, rows.lse) and torch.equal(found.rows.entropy, rows.entropy)
    assert torch.equal(found.mass, mass) and torch.equal(found.counts, counts)
    limits = pooled_quantiles(q, k, RATIOS, **wanted)
    assert torch.equal(found.thresholds, limits)
    alone = layer_statistics(q, k, eps=(), lengths=lengths, backend="triton")
    assert torch.equal(alone.mass, mass) and alone.counts.shape[2] == 0 and alone.thresholds.shape[2] == 0


def test_quantiles_of_ties():
    q, k, _ = heads(64, 1, 64)
    found = pooled_quantiles(q * 0, k, (0.3, 0.9), backend="triton")
    assert torch.allclose(found, torch.tensor(1 / 64), rtol=1e-5)


def equal_logits(q, k):
    return q * 0, k


def few_logits(q, k):
    """Multiples of one number, in rows whose log-sum-exp differs."""
    first = torch.arange(q.shape[-1], device=q.device) < 4
    return torch.where(q > 0, 1.0, -1.0) * first, torch.where(k > 0, 1.0, -1.0)


def weights_of_one_and_zero(q, k):
    q, k = q * 0, k * 0
    q[..., 0], k[:, :, 3, 0] = 60.0, 60.0
    return q, k


@pytest.mark.parametrize("tied", [equal_logits, few_logits, weights_of_one_and_zero])
@pytest.mark.parametrize("how", [{}, {"num_keys": 30}, {"lengths": [70, 41]}])
def test_thresholds_of_ties_take_few_passes(monkeypatch, tied, how):
    from trainer.attention import triton_quantiles

    count, passes = triton_quantiles.key_pass, []
    monkeypatch.setattr(triton_quantiles, "key_pass", lambda *a, **options: passes.append(1) or count(*a, **options))
    q, k = tied(*heads(70, 2, 64)[:2])
    q[0, 1, 5] = math.nan  # this head's thresholds are not looked at; it may not take more passes either
    ratios = (0.1, 0.5, 0.9, 1.0)
    found = pooled_quantiles(q, k, ratios, backend="triton", rank_error=0.0, **how).double()
    assert len(passes) <= 8  # halving an interval down to a float32 takes about thirty
    for sample, length in enumerate(how.get("lengths", [70, 70])):
        valid = reference.attention_weights(q[sample : sample + 1, :, :length], k[sample : sample + 1, :, :length])
        for head, pool in enumerate(valid[0, :, :, : how.get("num_keys")].flatten(1)):
            for ratio, threshold in zip(ratios, found[sample, head], strict=True):
                rank = min(int(ratio * len(pool)), len(pool) - 1)
                within = (pool < threshold * (1 - 1e-5) - 1e-36).sum(), (pool <= threshold * (1 + 1e-5) + 1e-36).sum()
                assert (sample, head) == (0, 1) or within[0] <= rank <= within[1]


@pytest.mark.parametrize("how", [{"lengths": [41, 9]}, {"num_keys": 30}, {"num_keys": 30, "lengths": [41, 9]}])
def test_a_ratio_of_one_is_the_largest_weight_that_is_pooled(how):
    q, k, _ = heads(50, 2, 64)
    q[:, :, :, 0], k[:, :, 40:, 0] = 8.0, 8.0  # keys that are not pooled hold most of their rows
    valid = None if "lengths" not in how else torch.tensor(how["lengths"], device=DEVICE)
    pool = reference.attention_weights(q, k, valid)[..., : how.get("num_keys")].flatten(2)
    found = pooled_quantiles(q, k, (1.0,), backend="triton", **how)
    below = (pool < found.double() * (1 - 1e-5)).sum(dim=-1)
    assert (below == pool.shape[-1] - 1).all() and (pool.amax(dim=-1) >= found[..., 0].double() * (1 - 1e-5)).all()


def test_a_ratio_is_read_as_the_decimal_it_is_written_as():
    q, k, _ = heads(50, 2, 64)  # 0.3 of the 2,500 weights are 750, but 1 - 0.7 is above 0.3
    found = pooled_quantiles(q, k, (0.3,), backend="triton", rank_error=0.0)
    weights = reference.attention_weights(q, k).flatten(2)
    least, most = ((weights < found.double() * (1 + side * 1e-5)).sum(dim=-1) for side in (-1, 1))
    assert (least <= 750).all() and (most >= 750).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"renormalise": False}, {"tail": "mean"}, {"num_keys": 20}, {"lengths": [-3, 0]}])
def test_masked_attention(size, dtype, how):
    q, k, v = heads(*size, dtype)
    n = size[0]
    how = dict(how)
    if "num_keys" in how:
        how["num_keys"] = min(n, how["num_keys"])
    if "lengths" in how:
        how["lengths"] = torch.tensor([max(1, n + less) for less in how["lengths"]], device=DEVICE)
    weights = reference.attention_weights(q, k, how.get("lengths"))
    ordered = weights.flatten(2).sort(-1).values
    place = ordered.shape[-1] // 2
    # Between two weights, so that rounding decides nothing.
    thresholds = ((ordered[..., max(0, place - 1)] + ordered[..., place]) / 2).float()
    out, realised, dropped = masked_attention(q, k, v, thresholds, backend="triton", **how)
    want, want_realised, want_dropped = masked_attention(q, k, v, thresholds, backend="dense", **how)
    close = 2e-2 if dtype == torch.bfloat16 else 2e-4
    flips = 2 / max(1, n * n)
    torch.testing.assert_close(realised.double(), want_realised, rtol=0, atol=flips + 1e-7)
    torch.testing.assert_close(dropped.double(), want_dropped, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(out.double(), want.double(), rtol=close, atol=close)


def test_nothing_and_everything_removed():
    q, k, v = heads(70, 2, 64)
    zero = torch.zeros(2, 2, device=DEVICE)
    dense, realised, dropped = masked_attention(q, k, v, zero, backend="triton")
    again = masked_attention(q, k, v, zero - math.inf, backend="triton")[0]
    assert torch.equal(dense, again) and not realised.any() and not dropped.any()
    torch.testing.assert_close(dense.double(), reference.attention_weights(q, k) @ v.double(), rtol=0, atol=1e-5)
    peaks, realised, _ = masked_attention(q, k, v, zero + math.inf, backend="triton")
    best = reference.attention_weights(q, k).argmax(-1)
    torch.testing.assert_close(peaks, v.gather(2, best[..., None].expand_as(v)), rtol=1e-5, atol=1e-5)
    assert torch.allclose(realised, torch.tensor(69 / 70))


def test_peaked_rows_underflow_to_nothing():
    q, k, v = heads(70, 1, 64)
    q, k = q * 0, k * 0
    q[..., 0], k[:, :, 3, 0] = 60.0, 60.0  # one weight is 1, the others far below float32's least
    mass, counts = key_statistics(q, k, eps=(0.5,), backend="triton")
    assert torch.allclose(mass[..., 3], torch.tensor(70.0)) and counts[..., 0, 3].eq(70).all() and counts.sum() == 140
    out = masked_attention(q, k, v, torch.full((2, 1), 0.5, device=DEVICE), backend="triton")[0]
    torch.testing.assert_close(out, v[:, :, 3:4].expand_as(v))
