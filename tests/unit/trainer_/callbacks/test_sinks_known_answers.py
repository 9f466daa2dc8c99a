"""Sinks and their decoys in whole Mochi models: each is written into a head's weights and has a closed form.

Legend: B batch, N tokens ([vision | text]), h heads, E eps values.
"""

import math

import pytest
import torch

from tests.support import known_answers
from trainer.attention import EPS, key_statistics, sink_statistics, sink_verdict
from trainer.models.captions import Captions
from trainer.models.mochi import SplitMochi

backends = pytest.mark.parametrize("backend", known_answers.BACKENDS)
#: Everywhere the statistics are taken in chunks of rows that do not divide N.
CHUNK = 7


@pytest.fixture
def make_model(make_transformer):
    """heads -> a model of three blocks with free channels."""

    def make(heads=2):
        model = make_transformer(5, num_attention_heads=heads, pooled_projection_dim=16)
        known_answers.free_channels(model)
        return model

    return make


def sinks(model, batch, layer, backend, **options):
    split_model = SplitMochi(model)

    def measure(q, k, v, call):
        options.setdefault("projection", split_model.output_projection(layer))
        vision = call.layout.num_vision
        return sink_statistics(q, k, v, num_vision=vision, backend=backend, chunk=CHUNK, **options)

    return known_answers.watch(split_model, batch, layer, measure)


@backends
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_verdict_turns_where_the_closed_form_crosses_eps(make_model, make_batch, layer, backend):
    vision, text = 100, 4  # with fewer tokens a weight of 0.01 is less than all alike
    tokens = vision + text
    # Two heads for each eps, a thousandth below and above it.
    closed = [eps * side for eps in EPS for side in (0.999, 1.001)]
    logits = [math.log(a * (tokens - 1) / (1 - a)) for a in closed]
    model = make_model(len(closed))
    for head, logit in enumerate(logits):
        known_answers.write_head(model, (layer, head), **known_answers.attracted(0, by=logit / 6.0), strength=6.0)
    places = [17, 99]  # another sink in each sample
    codes = [known_answers.marked(vision, [[place]], text) for place in places]
    batch = known_answers.coded_batch(make_batch, *(torch.stack(part) for part in zip(*codes, strict=True)), (4, 5, 5))
    got = sinks(model, batch, layer, backend)
    closed = torch.tensor(closed, dtype=torch.float64)
    torch.testing.assert_close(got.alpha.double(), closed.expand(2, -1), rtol=1e-5, atol=0)
    assert torch.equal(got.alpha_key, torch.tensor(places)[:, None].expand(2, len(closed)))
    expected = (closed[:, None] > torch.tensor(EPS, dtype=torch.float64)).expand(2, -1, -1)
    assert torch.equal(got.fraction.double(), expected.double())
    assert torch.equal(sink_verdict(got.fraction), expected)
    assert (got.key == got.alpha_key[..., None])[expected].all()
    assert (got.text_alpha.double() - (1 - closed) / (tokens - 1)).abs().max() < 1e-7


@backends
@pytest.mark.parametrize("text", [0, 20])
def test_over_half_of_the_queries_make_a_sink(make_model, make_batch, text, backend):
    vision, counts = 100 - text, (49, 50, 51)
    model = make_model()
    # Queries with the second marker attend to the key of the first, all others to everything alike.
    query = {0: {2: 1.0}, 4: {known_answers.CONSTANT: 1.0, 2: -1.0}}
    known_answers.write_head(model, (1, 0), query, known_answers.attracted(0)["key"], strength=10.0)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0)).tolist()
    codes = [known_answers.marked(vision, [[33], order[:count]], text) for count in counts]
    grid = (4, 5, 5) if text == 0 else (4, 4, 5)
    batch = known_answers.coded_batch(make_batch, *(torch.stack(part) for part in zip(*codes, strict=True)), grid)
    got = sinks(model, batch, 1, backend, eps=(0.05, 0.3, 0.5))
    share = torch.tensor(counts) / 100
    torch.testing.assert_close(got.fraction[:, 0].float(), share[:, None].expand(-1, 3))
    assert sink_verdict(got.fraction)[:, 0].all(dim=-1).tolist() == [False, False, True]
    assert not sink_verdict(got.fraction)[:2, 0].any() and (got.key[:, 0] == 33).all()
    heavy = known_answers.sink_weight(10.0, 100)
    alpha = share.double() * heavy + (1 - share.double()) / 100
    torch.testing.assert_close(got.alpha[:, 0].double(), alpha, rtol=1e-5, atol=0)


@backends
def test_two_half_mass_keys_are_sinks_below_a_half_only(make_model, make_batch, backend):
    model, tokens, eps = make_model(), 48, (0.3, 0.49, 0.5)
    known_answers.write_head(model, (2, 1), **known_answers.attracted(0), strength=8.0)
    vision, text = known_answers.marked(45, [[4, 31]], 3)
    batch = known_answers.coded_batch(make_batch, vision[None], text[None], (5, 3, 3))
    got = sinks(model, batch, 2, backend, eps=eps)
    half = known_answers.sink_weight(8.0, tokens, sinks=2)
    assert 0.49 < half < 0.5
    assert got.alpha[0, 1].item() == pytest.approx(half, rel=1e-5)
    assert sink_verdict(got.fraction)[0, 1].tolist() == [True, True, False]
    # Both keys share: the verdict names one, the counts are the same.
    mass, counts = known_answers.watch(
        SplitMochi(model), batch, 2, lambda q, k, v, call: key_statistics(q, k, eps=eps, backend=backend, chunk=CHUNK)
    )
    assert got.key[0, 1, 0] in (4, 31)
    assert counts[0, 1, :, 4].tolist() == counts[0, 1, :, 31].tolist() == [tokens, tokens, 0]
    assert mass[0, 1, [4, 31]].tolist() == pytest.approx([half * tokens] * 2, rel=1e-5)


@backends
def test_two_keys_with_half_of_the_queries_each_are_no_sinks(make_model, make_batch, backend):
    model = make_model()
    query = {0: {3: 1.0}, 4: {known_answers.CONSTANT: 1.0, 3: -1.0}}  # the third marker chooses the key
    key = {0: {1: 1.0}, 4: {2: 1.0}, 2: {known_answers.CONSTANT: 1.0, 1: -1.0, 2: -1.0}}
    known_answers.write_head(model, (1, 0), query, key, strength=12.0)
    vision, text = known_answers.marked(48, [[4], [31], list(range(0, 48, 2))])
    got = sinks(model, known_answers.coded_batch(make_batch, vision[None], text[None], (3, 4, 4)), 1, backend)
    assert got.fraction[0, 0, 1:].tolist() == [0.5] * 4
    assert not sink_verdict(got.fraction)[0, 0, 1:].any()
    weight = known_answers.sink_weight(12.0, 48)
    assert got.alpha[0, 0].item() == pytest.approx(weight / 2 + (1 - weight) / 47 / 2, rel=1e-5)


@backends
@pytest.mark.parametrize("layer", [0, 2])
def test_a_broadcast_sink_and_a_no_op_sink_differ_in_their_values_alone(make_model, make_batch, layer, backend):
    model, factors, sink = make_model(), (15.0, -0.875), 20
    for head, factor in enumerate(factors):
        value = {3: {known_answers.CONSTANT: 1.0, 1: factor}}
        known_answers.write_head(model, (layer, head), **known_answers.attracted(0), strength=9.0, value=value)
    vision, text = known_answers.marked(36, [[sink]], 3)
    batch = known_answers.coded_batch(make_batch, vision[None], text[None], (4, 3, 3))
    got = sinks(model, batch, layer, backend)
    assert sink_verdict(got.fraction)[0, :, EPS.index(0.3)].tolist() == [True, True]
    assert got.alpha_key[0].tolist() == [sink, sink]
    # The value's one component is 1 + factor at the sink and 1 elsewhere, over the norm of the stream that enters.
    split_model = SplitMochi(model)
    with torch.no_grad():
        state = split_model.embed(batch.latents, torch.tensor([100.0]), Captions.of(batch))
        entering = split_model.run(state, 0, layer).vision[0].double()
    size = (entering.square().mean(dim=1) + 1e-6).rsqrt()
    others = torch.cat([size[:sink], size[sink + 1 :]]).mean()
    expected = [float(size[sink] * (1 + factor) / others) for factor in factors]
    assert expected[0] > 8 and expected[1] < 0.2
    # Values of one component are parallel, so the output projection scales all alike.
    assert got.value_norm_ratio[0].tolist() == pytest.approx(expected, rel=1e-4)
    assert got.projected_value_norm_ratio[0].tolist() == pytest.approx(expected, rel=1e-4)


@backends
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_text_sink_is_no_verdict_and_is_reported_apart(make_model, make_batch, layer, backend):
    model, vision, text = make_model(), 30, 5
    known_answers.write_head(model, (layer, 0), **known_answers.attracted(0), strength=8.0)
    codes = known_answers.marked(vision, [[vision]], text)  # the first text token
    got = sinks(model, known_answers.coded_batch(make_batch, codes[0][None], codes[1][None], (2, 5, 3)), layer, backend)
    weight = known_answers.sink_weight(8.0, vision + text)
    assert not sink_verdict(got.fraction)[0, 0].any() and got.fraction[0, 0].max() == 0
    assert got.text_fraction[0, 0].tolist() == [1.0] * len(EPS)
    assert got.text_alpha[0, 0].item() == pytest.approx(weight, rel=1e-5)
    assert got.alpha[0, 0].item() == pytest.approx((1 - weight) / (vision + text - 1), rel=1e-3)


@backends
def test_a_diagonal_head_is_no_sink(make_model, make_batch, backend):
    model, vision, text = make_model(), 12, 4
    bits = torch.tensor([[1.0 if token >> bit & 1 else -1.0 for bit in range(4)] for token in range(vision + text)])
    own = {bit: {1 + bit: 1.0} for bit in range(4)}  # every token's code is its own; the next has a cosine of a half
    known_answers.write_head(model, (1, 1), own, own, strength=16.0)
    batch = known_answers.coded_batch(make_batch, bits[None, :vision], bits[None, vision:], (3, 2, 2))
    got = sinks(model, batch, 1, backend)
    assert got.fraction[0, 1].tolist() == [1 / 16] * len(EPS)
    assert not sink_verdict(got.fraction)[0, 1].any()
    assert got.alpha[0, 1].item() == pytest.approx(1 / 16, rel=1e-5)
    # Four codes differ in one bit, six in two, four in three, one in all.
    diagonal = 1 / (1 + 4 * math.exp(-8) + 6 * math.exp(-16) + 4 * math.exp(-24) + math.exp(-32))
    top = known_answers.watch(
        SplitMochi(model), batch, 1, lambda q, k, v, call: known_answers.softmax64(q, k)[0, 1].diagonal().tolist()
    )
    assert top == pytest.approx([diagonal] * 16, rel=1e-5)


@backends
@pytest.mark.parametrize("keys", [2, 4])
def test_a_weight_equal_to_eps_does_not_count(make_model, make_batch, keys, backend):
    model, vision, text = make_model(), 27, 4
    # So steep that other weights are 0 in float32 and in float64: what is left is exactly 1 / 2 or 1 / 4. Blank patches
    # make the keys equal bit for bit, in the first block, where no attention has told the tokens apart.
    known_answers.write_head(model, (0, 0), **known_answers.attracted(0), strength=2000.0)
    codes = known_answers.marked(vision, [[1, 8, 20, 26][:keys]], text)
    batch = known_answers.coded_batch(make_batch, codes[0][None], codes[1][None], (3, 3, 3), blank=True)
    hit = 1 / keys
    # The next smaller float32; the kernels compare logarithms, whose spacing is wider.
    below = hit - 1e-6 if backend == "triton" else float(torch.nextafter(torch.tensor(hit), torch.tensor(0.0)))
    got = sinks(model, batch, 0, backend, eps=(hit, below))
    assert got.alpha[0, 0].item() == hit
    assert got.fraction[0, 0].tolist() == [0.0, 1.0]
    assert sink_verdict(got.fraction)[0, 0].tolist() == [False, True]
