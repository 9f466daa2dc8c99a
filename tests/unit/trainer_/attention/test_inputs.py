"""What the engine refuses before it computes; what a single function refuses stands in the tests of its module."""

import pytest
import torch

from tests.support.attention_draws import draw_heads
from trainer.attention import api, layer_statistics, masked_attention, sink_statistics
from trainer.attention.inputs import checked


def test_values_that_do_not_fit_the_keys_are_named():
    q, k, v = draw_heads("random", 0, 2, 3, 5, 16)
    for wrong in (v[:, :, :4], v[:, :2], v[0]):
        with pytest.raises(ValueError, match="got v of shape"):
            masked_attention(q, k, wrong, torch.zeros(2, 3))
        with pytest.raises(ValueError, match="got v of shape"):
            sink_statistics(q, k, wrong, num_vision=4)


@pytest.mark.parametrize("eps", [(0.3, -0.1), (float("nan"),)])
def test_wrong_eps_are_named(eps):
    q, k, _ = draw_heads("random", 0, 1, 1, 5, 16)
    with pytest.raises(ValueError, match="got eps"):
        layer_statistics(q, k, eps=eps)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
def test_every_back_end_is_given_checked_inputs(backend):
    q, k, _ = draw_heads("random", 0, 1, 1, 5, 16)
    with pytest.raises(ValueError, match="got rank_error"):
        layer_statistics(q, k, ratios=(0.5,), rank_error=2.0, backend=backend)
    with pytest.raises(ValueError, match="got chunk 0"):
        layer_statistics(q, k, chunk=0, backend=backend)


def test_padding_and_pool_sizes():
    q, k, _ = draw_heads("random", 0, 2, 1, 5, 16)
    x = checked(q, k, lengths=[2, 5], num_keys=4)
    assert x.padding().tolist() == [[False, False, True, True, True], [False] * 5]
    assert x.pool_sizes() == [2 * 2, 5 * 4]
    whole = checked(q[:, :, :3], k)
    assert whole.padding() is None and whole.pool_sizes() == [15, 15] and whole.num_keys == 5


def test_triton_refuses_shapes_that_its_kernels_cannot_read(monkeypatch):
    pytest.importorskip("triton", reason="triton is made for Linux only")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    q, k, v = draw_heads("random", 0, 1, 1, 5, 16)
    with pytest.raises(ValueError, match="got 3 queries and 5 keys"):
        api.choose_backend("triton", q[:, :, :3], k)
    with pytest.raises(ValueError, match="got values 8 wide"):
        api.choose_backend("triton", q, k, v[..., :8])
    assert isinstance(api.choose_backend(None, q, k, v), api.Chunked)
