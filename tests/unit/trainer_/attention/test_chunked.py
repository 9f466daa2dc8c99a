"""All statistics of a layer at once: what the single functions give, in fewer passes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.attention_draws import draw_heads, heads_strategy, lengths_of
from trainer.attention import EPS, chunked_quantiles, key_statistics, layer_statistics, pooled_quantiles, row_statistics

RATIOS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("backend", ["dense", "chunked"])
@settings(max_examples=60, deadline=None)
@given(
    heads_strategy, st.integers(1, 50), st.booleans(), st.integers(1, 45), st.sampled_from([(), (0.5,), RATIOS]),
    st.sampled_from([(), EPS, (0.001,)]),
)  # fmt: skip
def test_it_is_bit_for_bit_what_the_single_functions_give(backend, draw, chunk, padded, vision, ratios, eps):
    kind, seed, batch, heads, tokens, width, dtype = draw
    q, k, _ = draw_heads(kind, seed, batch, heads, tokens, width, dtype)
    how = {"lengths": lengths_of(seed, batch, tokens) if padded else None, "backend": backend, "chunk": chunk}
    num_keys = min(vision, tokens)
    found = layer_statistics(q, k, eps=eps, ratios=ratios, num_keys=num_keys, **how)
    rows, (mass, counts) = row_statistics(q, k, **how), key_statistics(q, k, eps=eps, **how)
    for name in ("lse", "maximum", "entropy"):
        assert torch.equal(getattr(found.rows, name), getattr(rows, name)), name
    assert torch.equal(found.mass, mass) and torch.equal(found.counts, counts)
    assert torch.equal(found.thresholds, pooled_quantiles(q, k, ratios, num_keys=num_keys, **how))


@pytest.mark.parametrize("ratios, passes", [((), 1), (RATIOS, 2)])
def test_rows_and_keys_are_read_in_the_first_pass_of_the_thresholds(ratios, passes, monkeypatch):
    made, counted = [], chunked_quantiles.logit_and_weight_chunks
    monkeypatch.setattr(
        chunked_quantiles, "logit_and_weight_chunks", lambda *a, **o: made.append(1) or counted(*a, **o)
    )
    q, k, _ = draw_heads("random", 3, 1, 2, 40, 16)
    layer_statistics(q, k, ratios=ratios, chunk=7)
    assert len(made) == passes
