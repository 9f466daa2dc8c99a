"""Interventions on whole tiny models, mostly Mochi: what they do to the velocity, and that they are gone afterwards."""

import contextlib

import pytest
import torch

from tests.support.attention_draws import reduced_attention
from tests.support.tiny_families import inputs, make
from trainer.attention import dense as reference
from trainer.attention.interventions import AttentionMapRecorder, at_steps, first_text_token, skip_heads, temperature
from trainer.models.captions import Captions
from trainer.models.families import split_model_of
from trainer.models.layout import dense_attention
from trainer.models.mochi import SplitMochi


@pytest.fixture
def split_model(make_transformer):
    return SplitMochi(make_transformer(3))


def velocity(split_model, batch):
    time = torch.linspace(200.0, 800.0, len(batch))
    with torch.no_grad():
        return split_model(batch.latents, time, Captions.of(batch))


def written_out(weights_of):
    """An attention function that multiplies weights_of(q, k, call), dense float64, with v."""

    def attend(q, k, v, call):
        return (weights_of(q, k, call) @ v.double()).to(v.dtype)

    return attend


def seen(split_model, batch, layer, function=dense_attention):
    """Weights, outputs and velocity of a run in which `layer` attends by `function`."""
    found = {}

    def attend(q, k, v, call):
        found.update(weights=reference.attention_weights(q, k), out=function(q, k, v, call))
        return found["out"]

    with split_model.attention({layer: attend}):
        found["velocity"] = velocity(split_model, batch)
    return found


def test_a_skipped_head_takes_no_part_in_the_output_projection(split_model, make_transformer, make_batch):
    batch = make_batch((3, 3))
    with split_model.attention({1: skip_heads([1])}):
        got = velocity(split_model, batch)
    pruned = make_transformer(3)
    for projection in (pruned.transformer_blocks[1].attn1.to_out[0], pruned.transformer_blocks[1].attn1.to_add_out):
        projection.weight.data[:, 8:] = 0.0  # heads are 8 wide
    torch.testing.assert_close(got, velocity(SplitMochi(pruned), batch), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(got, velocity(split_model, batch), atol=1e-4)


def test_temperature_on_a_model_is_that_of_scaled_queries(split_model, make_batch):
    batch = make_batch((4, 4))
    with split_model.attention({0: temperature(0.5), 2: temperature(1.5)}):
        got = velocity(split_model, batch)
    by_hand = {
        layer: written_out(lambda q, k, call, value=value: reference.attention_weights(q.double() / value, k))
        for layer, value in ((0, 0.5), (2, 1.5))
    }
    with split_model.attention(by_hand):
        torch.testing.assert_close(got, velocity(split_model, batch), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, velocity(split_model, batch), atol=1e-4)


def test_a_recorded_map_injected_is_the_stored_map_injected(split_model, make_batch):
    source, target = make_batch((4, 4), seed=1), make_batch((4, 4), seed=2)
    maps: dict[tuple[int, int], torch.Tensor] = {}
    step = 0
    record = AttentionMapRecorder(lambda: step, device="cpu")

    def store(q, k, v, call):
        maps[call.layer, step] = reference.attention_weights(q, k)
        return record.record()(q, k, v, call)

    for step in (0, 1):
        with split_model.attention({0: store, 1: store}):
            velocity(split_model, make_batch((4, 4), seed=1 + step))
    step = 0
    functions = {layer: record.inject() for layer in (0, 1)}
    with split_model.attention(functions):
        got = velocity(split_model, target)
    with split_model.attention({layer: written_out(lambda q, k, call: maps[call.layer, 0]) for layer in (0, 1)}):
        torch.testing.assert_close(got, velocity(split_model, target), rtol=1e-4, atol=1e-5)
    with split_model.attention(functions):
        assert torch.equal(velocity(split_model, source), velocity(split_model, source))
        torch.testing.assert_close(velocity(split_model, source), plain(split_model, source), rtol=1e-5, atol=1e-6)
    with (
        split_model.attention({2: record.inject()}),
        pytest.raises(ValueError, match="got layer 2, joint attention, at"),
    ):
        velocity(split_model, target)
    with split_model.attention({1: record.inject()}), pytest.raises(ValueError, match="got a map from captions of"):
        velocity(split_model, make_batch((4, 2)))


def test_maps_of_self_and_cross_attention_are_recorded_apart():
    """In Wan, whose self-attention has no text among its keys: captions of other lengths do there."""
    model = make("wan")
    wan = split_model_of(model)
    source, target = inputs(model, (4, 2), seed=1), inputs(model, (4, 2), seed=2)
    record = AttentionMapRecorder(lambda: 0)
    maps = {}

    def store(q, k, v, call):
        maps[call.site] = reference.attention_weights(q, k)
        return record.record()(q, k, v, call)

    def run(args, functions):
        with torch.no_grad(), contextlib.ExitStack() as stack:
            for site, function in functions.items():
                stack.enter_context(wan.attention({1: function}, site=site))
            return wan(**args)

    run(source, {"self": store, "cross": store})
    for site in ("self", "cross"):
        got = run(target, {site: record.inject()})
        want = run(target, {site: written_out(lambda q, k, call: maps[call.site])})
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, run(target, {}), atol=1e-4)
    shorter = inputs(model, (1, 3), seed=2)
    assert not torch.allclose(run(shorter, {"self": record.inject()}), run(shorter, {}), atol=1e-4)
    with pytest.raises(ValueError, match="got a map from captions of"):
        run(shorter, {"cross": record.inject()})


def plain(split_model, batch):
    return seen(split_model, batch, 0)["velocity"]


def test_other_text_tokens_are_as_if_they_were_not_there(split_model, make_batch):
    batch = make_batch((5, 2, 0), pad=2)
    vision = batch.latents.shape[2] * (batch.latents.shape[3] // 2) * (batch.latents.shape[4] // 2)
    last = split_model.num_blocks - 1  # its text stream goes no further: a caption of one token is the same for vision
    found = seen(split_model, batch, last, first_text_token(vision))

    def only_first(q, k, v, call):
        return reduced_attention(q, k, v, call.layout.text_lengths, vision, keys=range(vision + 1)).to(v.dtype)

    torch.testing.assert_close(
        found["velocity"], seen(split_model, batch, last, only_first)["velocity"], rtol=1e-4, atol=1e-5
    )
    dense = plain(split_model, batch)
    changed = (found["velocity"] - dense).flatten(1).abs().amax(dim=1)
    assert changed[0] > 1e-5 and changed[1] > 1e-5
    assert changed[2] < 1e-5  # no caption, nothing to drop
    without = seen(split_model, batch, last, first_text_token(vision, None))
    assert (without["velocity"] - found["velocity"]).flatten(1).abs().amax(dim=1)[0] > 1e-5


def test_only_the_chosen_layer_head_and_step_change(split_model, make_batch):
    batch, step = make_batch((3, 3)), 0
    function = at_steps({1, 2}, lambda: step, skip_heads([0]))
    outs = []
    for step in range(4):  # noqa: B007 - read by `function`
        outs.append(seen(split_model, batch, 1, function)["out"])
    own = seen(split_model, batch, 1)["out"]
    assert [torch.equal(out, own) for out in outs] == [True, False, False, True]
    assert all(torch.equal(out[:, 1], own[:, 1]) and out[:, 0].abs().max() == 0 for out in outs[1:3])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "function", [skip_heads([0]), temperature(0.3), first_text_token(12), first_text_token(12, None, heads=[1])]
)
def test_everything_is_taken_off_afterwards_also_when_something_raises(split_model, make_batch, function, fails):
    batch = make_batch((3, 1))
    before = velocity(split_model, batch)

    def broken(q, k, v, call):
        raise RuntimeError("no attention")

    def changed():
        with split_model.attention({0: function, 1: function, 2: broken if fails else function}):
            return velocity(split_model, batch)

    if fails:
        with pytest.raises(RuntimeError, match="no attention"):
            changed()
    else:
        assert not torch.allclose(changed(), before, atol=1e-5)
    assert torch.equal(velocity(split_model, batch), before)


def test_what_is_set_inside_another_gives_it_back(split_model, make_batch):
    def broken(q, k, v, call):
        raise RuntimeError("no attention")

    batch = make_batch((3, 1))
    before = velocity(split_model, batch)
    with split_model.attention({1: temperature(0.3)}):
        outer = velocity(split_model, batch)
        with split_model.attention({1: skip_heads([0]), 0: skip_heads([1])}):
            assert not torch.allclose(velocity(split_model, batch), outer, atol=1e-4)
            with pytest.raises(RuntimeError, match="no attention"), split_model.attention({0: broken}):
                velocity(split_model, batch)
        assert torch.equal(velocity(split_model, batch), outer)
        with (
            pytest.raises(ValueError, match="got attention functions"),
            split_model.attention({0: skip_heads([1]), 9: None}),
        ):
            pass
        assert torch.equal(velocity(split_model, batch), outer)
    assert torch.equal(velocity(split_model, batch), before)


@pytest.mark.parametrize("function", [temperature(0.3), skip_heads([0])])
def test_gradients_after_it_is_taken_off_are_those_of_the_forward_pass(split_model, make_batch, function):
    batch, time = make_batch((3, 3)), torch.tensor([200.0, 800.0])

    def gradients(checkpoint, inside):
        split_model.zero_grad()
        split_model.checkpoint_blocks = checkpoint  # the backward pass runs the blocks once more
        with split_model.attention({1: function}):
            loss = split_model(batch.latents, time, Captions.of(batch)).square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        return {name: p.grad.clone() for name, p in split_model.named_parameters() if p.grad is not None}

    expected = gradients(checkpoint=False, inside=True)
    for inside in (True, False):
        got = gradients(checkpoint=True, inside=inside)
        assert got.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
