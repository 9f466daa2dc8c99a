"""The engine at the heads and widths of the four model families, against a float64 softmax written out here.

Legend: B batch, N tokens, h heads, d head width.
"""

import math

import pytest
import torch

from tests.support.attention_draws import DTYPES
from trainer.attention import (
    EPS,
    key_statistics,
    log_histogram,
    masked_attention,
    pooled_quantiles,
    row_statistics,
    sink_statistics,
)

#: (h, d) of Mochi and HunyuanVideo, Wan 1.3B and 14B, CogVideoX 2B and 5B.
FAMILIES = [(24, 128), (12, 128), (40, 128), (30, 64), (48, 64)]
VISION, TOKENS, MIDDLE = 31, 37, 37 * 37 // 2


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", FAMILIES)
def test_every_figure_at_a_familys_own_size(heads, width, dtype, backend):
    generator = torch.Generator().manual_seed(heads + width)
    # As a model has them: heads beside each other within a token.
    q, k, v = (torch.randn(1, TOKENS, heads, width, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    how = {"backend": backend, "chunk": 5}
    weights = torch.softmax(torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) / math.sqrt(width), dim=-1)

    rows = row_statistics(q, k, **how)
    torch.testing.assert_close(rows.maximum.double(), weights.amax(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(rows.entropy.double(), -(weights * weights.log()).sum(dim=-1), rtol=1e-5, atol=1e-5)
    mass, counts = key_statistics(q, k, eps=EPS, **how)
    torch.testing.assert_close(mass.double(), weights.sum(dim=2), rtol=1e-5, atol=0)
    for index, eps in enumerate(EPS):
        near = ((weights - eps).abs() < 1e-6).sum(dim=2)
        assert ((counts[:, :, index] - (weights > eps).sum(dim=2)).abs() <= near).all()
    sinks = sink_statistics(q, k, v, num_vision=VISION, **how)
    torch.testing.assert_close(sinks.alpha.double(), weights.mean(dim=2)[..., :VISION].amax(dim=-1), rtol=1e-5, atol=0)

    ordered = weights.flatten(2).sort(dim=-1).values
    limits = pooled_quantiles(q, k, (0.5,), **how)[..., 0]
    torch.testing.assert_close(limits.double(), ordered[..., MIDDLE], rtol=1e-5, atol=0)
    between = (ordered[..., MIDDLE - 1] + ordered[..., MIDDLE]) / 2
    if dtype == torch.float32:  # the width of the gap decides whether float32 can tell its ends apart
        clear = (ordered[..., MIDDLE] / ordered[..., MIDDLE - 1] - 1)[0] > 1e-5
        assert clear.sum() > heads / 2
        gone = (weights < between[..., None, None]) & (weights < weights.amax(dim=-1, keepdim=True))
        out, realised, dropped = (t[0, clear].double() for t in masked_attention(q, k, v, between.float(), **how))
        kept = weights.masked_fill(gone, 0.0)
        want = (kept / kept.sum(dim=-1, keepdim=True) @ v.double())[0, clear]
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(realised, gone.double().mean(dim=(2, 3))[0, clear], rtol=1e-6, atol=0)
        torch.testing.assert_close(dropped, (weights * gone).sum(dim=(2, 3))[0, clear] / TOKENS, rtol=1e-4, atol=0)
    histogram = log_histogram(q, k, bins=4, lowest=1e-4, **how)
    assert histogram.shape == (1, heads, 4) and (histogram.sum(dim=-1) == TOKENS**2).all()
    for edge, above in ((1e-3, histogram[..., 1:]), (1e-2, histogram[..., 2:]), (1e-1, histogram[..., 3:])):
        near = ((weights / edge - 1).abs() < 1e-5).sum(dim=(2, 3))
        assert ((above.sum(dim=-1) - (weights > edge).sum(dim=(2, 3))).abs() <= near).all()
