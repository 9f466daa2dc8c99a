"""Planted sinks: their weight is known in closed form, and nothing else changes."""

import contextlib
import copy
import math

import pytest
import torch

from trainer.attention import sink_statistics, sink_verdict
from trainer.models.captions import Captions
from trainer.models.from_scratch import draw_frequencies, head_rows, reserve_channels
from trainer.models.layout import dense_attention
from trainer.models.mochi import SplitMochi
from trainer.models.planted_sinks import (
    MARKER_SLOPE,
    VISION_OFFSET,
    PlantedHead,
    hold_sinks,
    largest_markers,
    parse_heads,
    plant_sinks,
    planted_entries,
)
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig

CHANNELS = (0, 1)
#: The gain of both QK-norm weights, so that logits span sqrt(8) * 400 times the spread of the cosines.
PLANTED = PlantedHead(layer=1, head=1, gain=20.0)


@pytest.fixture
def free(make_transformer):
    """A model with two free channels."""
    model = make_transformer(5)
    draw_frequencies(model, 0)
    reserve_channels(model, CHANNELS)
    return model


@pytest.fixture
def planted(free):
    model = copy.deepcopy(free)
    plant_sinks(model, CHANNELS, [PLANTED])
    return model


def seen(model, batch, layer=PLANTED.layer):
    """(q, k, attention output) of one layer, the residual stream that enters it, and its input after the norm."""
    split_model, found = SplitMochi(model), {}

    def attend(q, k, v, call):
        found.update(q=q, k=k, v=v, call=call, out=dense_attention(q, k, v, call))
        return found["out"]

    with torch.no_grad(), split_model.attention({layer: attend}):
        time = torch.linspace(100.0, 900.0, len(batch))
        state = split_model.embed(batch.latents, time, Captions.of(batch))
        found["entering"] = split_model.run(state, 0, layer).vision
        split_model.finish(split_model.run(state, 0, split_model.num_blocks))
    return found


def test_the_sink_has_the_weight_of_the_closed_form(planted, make_batch):
    batch = make_batch([3, 3], seed=2)
    found, width = seen(planted, batch), planted.config.attention_head_dim
    # Both channels are scaled alike by the norm of the residual stream, which the quotient below cancels.
    constant, marker = found["entering"][..., CHANNELS[0]].double(), found["entering"][..., CHANNELS[1]].double()
    along = MARKER_SLOPE * marker + VISION_OFFSET * constant
    logits = PLANTED.gain**2 * math.sqrt(width) * along / (along.square() + constant.square()).sqrt()
    every = torch.cat([logits, torch.zeros(len(batch), 3, dtype=torch.float64)], dim=1)  # text keys are zero
    weights = every.softmax(dim=1)
    q, k = found["q"][:, PLANTED.head].double(), found["k"][:, PLANTED.head].double()
    measured = (q @ k.transpose(1, 2) / math.sqrt(width)).softmax(dim=-1)
    vision = logits.shape[1]
    torch.testing.assert_close(measured[:, :vision], weights[:, None].expand(-1, vision, -1), rtol=5e-3, atol=1e-4)
    assert weights.max(dim=1).values.min() > 1.5 / vision


def test_the_largest_marker_wins_for_every_query_of_every_input(free, make_batch):
    steep = PlantedHead(PLANTED.layer, PLANTED.head, 80.0)
    plant_sinks(free, CHANNELS, [steep])
    for seed in range(8):
        found = seen(free, make_batch([4, 4, 4], seed=seed))
        vision = found["entering"].shape[1]
        statistics = sink_statistics(found["q"], found["k"], found["v"], num_vision=vision, eps=(0.3,))
        assert sink_verdict(statistics.fraction)[:, steep.head].all(), seed
        assert torch.equal(statistics.key[:, steep.head, 0], found["entering"][..., CHANNELS[1]].argmax(dim=1))


def test_the_values_of_a_planted_head_are_those_of_the_closed_form(free, make_batch):
    batch, size, largest = make_batch([3, 3], seed=4), 0.7, 1.9
    plant_sinks(free, CHANNELS, [PlantedHead(PLANTED.layer, PLANTED.head, 80.0, largest, size)])
    found, width = seen(free, batch), free.config.attention_head_dim
    entering = found["entering"].double()
    vision = entering.shape[1]
    scale = entering.square().mean(dim=-1).add(1e-6).sqrt()  # of the norm before the attention
    along = size * (largest * entering[..., CHANNELS[0]] - entering[..., CHANNELS[1]]) / scale
    values = found["v"][:, PLANTED.head].double()
    expected = along[..., None].expand(-1, -1, width) / math.sqrt(width)
    torch.testing.assert_close(values[:, :vision], expected, rtol=1e-4, atol=1e-6)
    assert not values[:, vision:].any()
    # The constant channel is 1 in every token, so the token with the largest marker has a value near zero if it is m.
    markers = entering[..., CHANNELS[1]].amax(dim=1)
    torch.testing.assert_close(
        largest_markers(free, batch.latents, CHANNELS[1]).double(), markers, rtol=1e-5, atol=1e-6
    )
    sample = int((markers - largest).abs().argmin())
    norms = values[sample, :vision].norm(dim=-1)
    assert norms[entering[sample, :, CHANNELS[1]].argmax()] < norms.mean()


def test_held_sinks_stay_while_everything_else_trains(planted, make_module, make_batch, fit, config_json):
    surgery = SurgeryConfig(last=3, init="keep", train_outside=True, reserved_channels=CHANNELS, held_sinks=["1:1"])
    module = make_module(
        base=config_json, surgery=surgery, optim=OptimConfig(lr=0.01, warmup_steps=1, weight_decay=0.0)
    )
    model = module.split_model.transformer
    model.load_state_dict(planted.state_dict())
    before, batch = copy.deepcopy(model.state_dict()), make_batch([4, 2], seed=9)
    largest = seen(model, batch)
    fit(module, [make_batch(seed=n) for n in range(5)])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter, index in planted_entries(model, PLANTED.layer, PLANTED.head):
        assert torch.equal(parameter[index], before[names[id(parameter)]][index]), names[id(parameter)]
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert {"transformer_blocks.1.attn1.to_q.weight", "patch_embed.proj.weight", "proj_out.weight"} <= changed
    assert "pos_frequencies" not in changed
    after = seen(model, batch)
    own = slice(None), PLANTED.head
    for name in ("q", "k"):  # the norm of the stream cancels in them; only its scale changes the values
        torch.testing.assert_close(after[name][own], largest[name][own], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "head", "message"),
    [
        (CHANNELS, (3, 0), r"got heads \['3:0'\], expected layers in 0 \.\. 2"),
        ((), (1, 1), r"reserved_channels \(\), expected"),
    ],
)
def test_sinks_that_cannot_be_held_are_named(planted, channels, head, message):
    with pytest.raises(ValueError, match=message):
        hold_sinks(planted, channels, [head])


@pytest.mark.parametrize(
    ("surgery", "decay", "message"),
    [
        ({"init": "keep"}, 0.01, r"weight_decay 0\.01 .* expected 0"),
        ({"init": "dit"}, 0.0, r"init 'dit' .* expected 'keep'"),
    ],
)
def test_a_module_that_would_change_what_it_holds_is_refused(surgery, decay, message):
    with pytest.raises(ValueError, match=message):
        RetrainBlocks(
            base="base",
            surgery=SurgeryConfig(last=1, held_sinks=["1:1"], **surgery),
            optim=OptimConfig(weight_decay=decay),
        )


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ({"held_sinks": ["4:3"], "reserved_channels": (0, 1)}, ""),
        ({"held_sinks": ["4:2"], "reserved_channels": (0, 1)}, r"expected heads that are planted in .*: 4:3, 5:0, 6:3"),
        ({"held_sinks": ["4:3", "4:3"], "reserved_channels": (0, 1)}, r"each once"),
        ({"held_sinks": ["4:-1"], "reserved_channels": (0, 1)}, r"expected heads that are planted"),
        ({"held_sinks": ["4:3"], "reserved_channels": (0, 99999)}, r"reserved_channels \[0, 99999\].*: \[0, 1\]"),
        ({"held_sinks": ["4:3"], "reserved_channels": (1, 0)}, r"reserved_channels \[1, 0\]"),
        ({"held_sinks": ["4:3"]}, r"reserved_channels \[\]"),
        ({}, ""),
    ],
)
def test_held_sinks_must_be_those_of_the_base(surgery, message):
    module = RetrainBlocks(
        base="recipes/demo_base",
        surgery=SurgeryConfig(last=1, init="keep", **surgery),
        optim=OptimConfig(weight_decay=0.0),
    )
    with pytest.raises(ValueError, match=message) if message else contextlib.nullcontext():
        module.check()


def test_sinks_cannot_be_held_in_a_base_without_any(config_json):
    surgery = SurgeryConfig(last=1, init="keep", held_sinks=["1:1"], reserved_channels=(0, 1))
    module = RetrainBlocks(base=str(config_json), surgery=surgery, optim=OptimConfig(weight_decay=0.0))
    with pytest.raises(ValueError, match=r"has no planted\.json; expected a base that `reblock plant` wrote"):
        module.check()


@pytest.mark.parametrize("text", ["7", "7:1:2", "a:b", ""])
def test_other_names_of_heads_are_refused(text):
    assert parse_heads(["7:1", "0:3"]) == [(7, 1), (0, 3)]
    with pytest.raises(ValueError, match=r"expected LAYER:HEAD each, such as 7:1"):
        parse_heads(["7:1", text])


def test_other_heads_of_the_layer_stay_bit_for_bit(free, planted, make_batch):
    batch = make_batch([4, 1], seed=3)
    before, after = seen(free, batch), seen(planted, batch)
    assert torch.equal(before["out"][:, 1 - PLANTED.head], after["out"][:, 1 - PLANTED.head])
    assert not torch.equal(before["out"][:, PLANTED.head], after["out"][:, PLANTED.head])


@pytest.mark.parametrize("part", ["to_out", "ff", "constant", "marker", "unreserved"])
def test_channels_that_are_not_free_are_refused(free, make_transformer, part):
    if part == "unreserved":
        free = make_transformer(5)
    patch, block = free.patch_embed.proj, free.transformer_blocks[0]
    with torch.no_grad():
        if part == "to_out":
            block.attn1.to_out[0].weight[CHANNELS[1], 3] = 1e-6
        elif part == "ff":
            block.ff.net[2].weight[CHANNELS[0], 2] = 1e-6
        elif part == "constant":
            patch.bias[CHANNELS[0]] = 0.0
        elif part == "marker":
            patch.weight[CHANNELS[1]] = 0.0
    before = copy.deepcopy(free.state_dict())
    with pytest.raises(ValueError, match=r"channels 0 and 1 are not free.*reserved_channels"):
        plant_sinks(free, CHANNELS, [PLANTED])
    assert all(torch.equal(value, before[name]) for name, value in free.state_dict().items())


@pytest.mark.parametrize("place", [(3, 0), (-1, 0), (0, 2), (0, -1)])
def test_heads_that_do_not_exist_are_refused(free, place):
    with pytest.raises(ValueError, match=r"expected layers in 0 \.\. 2 and heads in 0 \.\. 1"):
        plant_sinks(free, CHANNELS, [PLANTED, PlantedHead(*place, 20.0)])


@pytest.mark.parametrize("channels", [(0,), (1, 1), (0, 16), (-1, 0), (0, 1, 2)])
def test_wrong_channels_are_refused(make_transformer, channels):
    with pytest.raises(ValueError, match=r"expected two distinct channels in 0 \.\. 15"):
        reserve_channels(make_transformer(), channels)


def test_reserved_channels_stay_free_in_training(make_module, make_batch, fit, config_json):
    surgery = SurgeryConfig(last=3, init="torch", train_outside=True, reserved_channels=CHANNELS)
    optim = OptimConfig(lr=0.01, warmup_steps=1, weight_decay=0.0)
    module = make_module(base=config_json, surgery=surgery, optim=optim)
    model = module.split_model.transformer
    marker = model.patch_embed.proj.weight[CHANNELS[1]].detach().clone()
    before = model.patch_embed.proj.weight.detach().clone()
    fit(module, [make_batch(seed=n) for n in range(5)])
    patch = model.patch_embed.proj
    assert not torch.equal(before, patch.weight), "the rest trains"
    assert torch.equal(patch.weight[CHANNELS[1]], marker)
    assert patch.bias[CHANNELS[0]] == 1 and patch.bias[CHANNELS[1]] == 0 and not patch.weight[CHANNELS[0]].any()
    rows = [row for head in range(model.config.num_attention_heads) for row in head_rows(model, head)]
    for block in model.transformer_blocks:
        assert not block.attn1.to_k.weight[rows].any() and not block.attn1.to_q.weight[rows].any()
        assert not block.attn1.to_v.weight[:, list(CHANNELS)].any()
    plant_sinks(model, CHANNELS, [PLANTED])
    entering = seen(model, make_batch([2, 0]), layer=2)["entering"]
    assert (entering[..., CHANNELS[0]] == 1).all()
