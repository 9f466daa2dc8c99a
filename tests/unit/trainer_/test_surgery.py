"""Choosing, re-initialising and freezing blocks; the fingerprint."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer.models.captions import Captions
from trainer.models.mochi import SplitMochi
from trainer.surgery import choose_blocks, fingerprint, freeze_all_but, frozen_fingerprint, reinitialise

#: Wide enough for statistics of a weight to mean something.
WIDE = {"num_attention_heads": 4, "attention_head_dim": 16, "pooled_projection_dim": 48, "num_layers": 2}


@given(count=st.integers(1, 60), data=st.data())
def test_chosen_blocks_are_sorted_distinct_and_in_range(count, data):
    wanted = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count, unique=True))
    assert choose_blocks(count, blocks=wanted) == tuple(sorted(wanted))
    last = data.draw(st.integers(1, count))
    assert choose_blocks(count, last=last) == tuple(range(count - last, count))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "last=None and blocks=None, expected exactly one"),
        ({"last": 1, "blocks": [0]}, "expected exactly one"),
        ({"last": 0}, r"got last=0, expected 1 \.\. 6"),
        ({"last": 7}, "the model has 6 blocks"),
        ({"blocks": []}, "the list is empty"),
        ({"blocks": [1, 1, 2]}, r"repeated: \[1\]"),
        ({"blocks": [6, -1, 0]}, r"out of range: \[-1, 6\].*0 \.\. 5"),
        ({"blocks": [3, 3, 9]}, r"repeated: \[3\]; out of range: \[9\]"),
    ],
)
def test_every_fault_of_a_choice_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        choose_blocks(6, **options)


@settings(max_examples=10, deadline=None)
@given(block=st.integers(0, 2), seed=st.integers(0, 1000), lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_a_dit_block_starts_as_the_identity(make_transformer, make_batch, block, seed, lengths):
    """Vision and text alike; the last block, which does not update its text, too."""
    split_model, batch = SplitMochi(make_transformer(seed)), make_batch(lengths, seed=seed)
    args = (batch.latents, torch.full((len(batch),), 300.0), Captions.of(batch))
    state = split_model.embed(*args)
    before = split_model.run(state, block, block + 1)
    assert not torch.equal(before.vision, state.vision)
    reinitialise(split_model.transformer.transformer_blocks[block], "dit", seed, family=SplitMochi)
    after = split_model.run(state, block, block + 1)
    assert torch.equal(after.vision, state.vision) and torch.equal(after.text, state.text)


def linears(block):
    return {name: m for name, m in block.named_modules() if isinstance(m, nn.Linear)}


def is_uniform(values, bound) -> bool:
    """Within +- bound, reaching it, with the standard deviation of a uniform distribution."""
    deviation = abs(values.std() / (bound / math.sqrt(3)) - 1)
    return bool(values.abs().max() <= bound and values.abs().max() > 0.97 * bound and deviation < 0.1)


@pytest.mark.parametrize("index", [0, 1])  # block 1 is the last: context_pre_only
@pytest.mark.parametrize("kind", ["dit", "torch", "normal"])
def test_distributions(make_transformer, kind, index):
    block = make_transformer(**WIDE).transformer_blocks[index]
    reinitialise(block, kind, seed=5, family=SplitMochi)
    for name, layer in linears(block).items():
        rows, columns = layer.weight.shape
        weight, bias = layer.weight.detach(), layer.bias
        if kind == "dit" and name.startswith("norm1"):
            assert not weight.any(), name
        elif kind == "dit":
            assert is_uniform(weight, math.sqrt(6 / (rows + columns))), name
        elif kind == "torch":
            assert is_uniform(weight, 1 / math.sqrt(columns)), name
            assert bias is None or is_uniform(bias.detach(), 1 / math.sqrt(columns)), name
        else:
            assert abs(weight.std() / 0.02 - 1) < 0.1 and weight.abs().max() > 0.05, name
        assert kind == "torch" or bias is None or not bias.any(), name
    # The trap: a zero output projection under the sandwich norm gives gradients a thousand times too large.
    assert block.attn1.to_out[0].weight.any() and block.ff.net[2].weight.any()
    norms = [p for name, p in block.named_parameters() if "norm_" in name and p.ndim == 1]
    assert len(norms) == 4 and all((p == 1).all() for p in norms)


def test_initialisation_is_deterministic_and_leaves_the_generator_alone(make_transformer):
    a, b, c = (make_transformer(i).transformer_blocks[0] for i in (1, 2, 3))
    before = torch.get_rng_state()
    reinitialise(a, "torch", 9, family=SplitMochi)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    reinitialise(b, "torch", 9, family=SplitMochi)
    reinitialise(c, "torch", 10, family=SplitMochi)
    for (name, x), y, z in zip(a.named_parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y), name
        assert x.ndim == 1 or not torch.equal(x, z), name


def test_values_do_not_depend_on_the_dtype_they_land_in(make_transformer):
    wide, narrow = make_transformer(1).transformer_blocks[0], make_transformer(1).bfloat16().transformer_blocks[0]
    reinitialise(wide, "normal", 9, family=SplitMochi)
    reinitialise(narrow, "normal", 9, family=SplitMochi)
    assert all(torch.equal(x.bfloat16(), y) for x, y in zip(wide.parameters(), narrow.parameters(), strict=True))


def test_keep_changes_nothing_and_unknown_kinds_and_layers_are_named(make_transformer):
    block = make_transformer().transformer_blocks[0]
    before = fingerprint(block.named_parameters())
    reinitialise(block, "keep", 0, family=SplitMochi)
    assert fingerprint(block.named_parameters()) == before
    with pytest.raises(ValueError, match=r"got initialisation 'orthogonal', expected one of \['dit', 'keep'"):
        reinitialise(block, "orthogonal", 0, family=SplitMochi)
    block.odd = nn.Conv1d(2, 2, 1)
    with pytest.raises(ValueError, match=r"odd\.bias', 'odd\.weight"):
        reinitialise(block, "dit", 0, family=SplitMochi)


def test_frozen_is_all_but_the_chosen_blocks(make_transformer):
    model = make_transformer(num_layers=4).requires_grad_(True)
    freeze_all_but(model, [model.transformer_blocks[i] for i in (1, 3)])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    want = {n for n, _ in model.named_parameters() if n.startswith(("transformer_blocks.1.", "transformer_blocks.3."))}
    assert trained == want and len(want) > 20
    frozen = {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad}
    outside = {"pos_frequencies", "patch_embed", "time_embed", "norm_out", "proj_out"}
    assert frozen == outside | {"transformer_blocks"}


@settings(max_examples=40, deadline=None)
@given(data=st.data(), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_one_flipped_bit_of_any_frozen_weight_shows_and_nothing_else_does(make_transformer, data, dtype):
    model = make_transformer(num_layers=2).to(dtype)
    freeze_all_but(model, [model.transformer_blocks[1]])
    before = frozen_fingerprint(model)
    names = [name for name, _ in model.named_parameters()]
    parameter = model.get_parameter(data.draw(st.sampled_from(names)))
    raw = parameter.data.reshape(-1).view(torch.uint8)
    raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert (frozen_fingerprint(model) == before) == parameter.requires_grad


def test_fingerprint_sees_names_shapes_and_dtypes_but_not_order():
    a, b = torch.arange(6.0), torch.arange(4.0)
    want = fingerprint([("a", a), ("b", b)])
    assert fingerprint([("b", b), ("a", a)]) == want
    assert fingerprint([("a", a.clone()[None].expand(1, 6)[0]), ("b", b)]) == want
    others = [
        [("a", a), ("c", b)], [("a", a.view(2, 3)), ("b", b)], [("a", a)], [("a", a.view(torch.int32)), ("b", b)],
        [("b", a), ("a", b)],
    ]  # fmt: skip
    assert len({want, *map(fingerprint, others)}) == 6
    assert fingerprint([("t", torch.arange(6.0).view(2, 3).T)]) == fingerprint([("t", copy.deepcopy(
        torch.arange(6.0).view(2, 3).T.contiguous()))])  # fmt: skip
    assert fingerprint([("empty", torch.zeros(0)), ("scalar", torch.zeros(()))])


def test_first_gradients_of_a_dit_block_are_sane(make_transformer, make_batch):
    """And the trap that `dit` avoids: a zero output projection makes them about a thousand times too large."""
    batch, norms = make_batch([4, 2], seed=1), {}
    args = (batch.latents, torch.tensor([900.0, 200.0]), Captions.of(batch))
    for kind in ("healthy", "dit", "trap"):
        split_model = SplitMochi(make_transformer(3))
        block = split_model.transformer.transformer_blocks[1]
        if kind != "healthy":
            reinitialise(block, "dit", 0, family=SplitMochi)
        if kind == "trap":
            reinitialise(block, "torch", 0, family=SplitMochi)
            nn.init.zeros_(block.attn1.to_out[0].weight)
            nn.init.zeros_(block.attn1.to_out[0].bias)
        split_model(*args).square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in block.parameters()])
        assert torch.isfinite(gradients).all()
        norms[kind] = float(gradients.norm())
    assert 0 < norms["dit"] < 10 * norms["healthy"]
    assert norms["trap"] > 100 * norms["healthy"]
