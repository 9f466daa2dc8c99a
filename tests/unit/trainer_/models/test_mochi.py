"""SplitMochi against diffusers' own forward, gradients included; and where attention is observed and changed."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_processor import MochiAttnProcessor2_0
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.models.captions import Captions
from trainer.models.layout import TokenLayout, dense_attention, text_lengths_of
from trainer.models.mochi import SplitMochi

CONFIGS = st.fixed_dictionaries(
    {
        "num_layers": st.integers(1, 4),
        "num_attention_heads": st.sampled_from([1, 2, 3]),
        "attention_head_dim": st.sampled_from([4, 8, 10]),
        "pooled_projection_dim": st.sampled_from([6, 8, 20]),
        "text_embed_dim": st.sampled_from([8, 24]),
        "in_channels": st.sampled_from([3, 12]),
        "time_embed_dim": st.sampled_from([8, 16]),
    }
)
GRIDS = st.tuples(st.integers(1, 3), st.sampled_from([2, 6, 10]), st.sampled_from([2, 4, 10]))
#: Captions: all empty, one, equal, ragged.
LENGTHS = st.one_of(
    st.lists(st.integers(0, 6), min_size=1, max_size=3),
    st.builds(lambda n, b: [n] * b, st.integers(0, 4), st.integers(1, 3)),
)


def arguments(batch, seed=0):
    timestep = 1000 * torch.rand(len(batch), generator=torch.Generator().manual_seed(seed))
    return batch.latents, timestep, Captions.of(batch)


def stock(model, x, timestep, captions):
    """diffusers' own forward."""
    return model(x, captions.text, timestep, captions.mask, return_dict=False)[0]


def gradients(model, out):
    model.zero_grad()
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weight).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_relative(got, want, tolerance, name="", noise=1e-9):
    """|got - want| is below `tolerance` times |want|, in norm, or below `noise`."""
    assert got.shape == want.shape and got.dtype == want.dtype
    error, scale = (got.double() - want.double()).norm(), want.double().norm()
    assert error <= tolerance * scale + noise, f"{name}: {error / scale.clamp(min=1e-30):.2e}"


@settings(max_examples=25, deadline=None)
@example(  # a caption of one token: its pooling weights have no gradient
    config={
        "num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 4, "pooled_projection_dim": 6,
        "text_embed_dim": 24, "in_channels": 3, "time_embed_dim": 8,
    },
    grid=(1, 2, 2), lengths=[1], pad=1, seed=1,
)  # fmt: skip
@given(config=CONFIGS, grid=GRIDS, lengths=LENGTHS, pad=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_composition_equals_diffusers_forward(make_transformer, make_batch, config, grid, lengths, pad, seed):
    model = make_transformer(seed, **config)
    ours = copy.deepcopy(model)
    args = arguments(make_batch(
        lengths, grid=grid, pad=pad, seed=seed, channels=config["in_channels"], text_width=config["text_embed_dim"]
    ), seed)  # fmt: skip
    want = stock(model, *args)
    want_grads = gradients(model, want)

    same = SplitMochi(ours, stock_attention=True)(*args)
    assert torch.equal(same, want)
    for name, grad in gradients(ours, same).items():
        assert torch.equal(grad, want_grads[name]), name

    got = SplitMochi(ours)(*args)
    assert_relative(got, want, 1e-5)
    # A gradient that is zero, as that of a softmax over one token, is what float32 leaves of the sums behind it.
    noise = torch.finfo(torch.float32).eps * torch.stack([g.norm() for g in want_grads.values()]).norm().item()
    for name, grad in gradients(ours, got).items():
        # Sums over few tokens cancel in single parameters, so the scale of a gradient is that of its kind.
        assert_relative(grad, want_grads[name], 1e-4, name, noise)


@settings(max_examples=10, deadline=None)
@given(config=CONFIGS, lengths=LENGTHS, pad=st.integers(0, 3), seed=st.integers(0, 10_000))
def test_diffusers_forward_with_our_processor(make_transformer, make_batch, config, lengths, pad, seed):
    model = make_transformer(seed, **config)
    args = arguments(make_batch(
        lengths, pad=pad, seed=seed, channels=config["in_channels"], text_width=config["text_embed_dim"]
    ))  # fmt: skip
    want = stock(model, *args).detach()
    split_model = SplitMochi(model)
    got = stock(split_model.transformer, *args)
    assert_relative(got, want, 1e-5)
    torch.testing.assert_close(got, split_model(*args), rtol=1e-5, atol=1e-6)


def test_running_in_parts_is_running_at_once(make_transformer, make_batch):
    split_model = SplitMochi(make_transformer(num_layers=4))
    args = arguments(make_batch())
    state = split_model.embed(*args)
    for start, stop in ((0, 0), (0, 1), (1, 3), (3, 4)):
        state = split_model.run(state, start, stop).detach()
    assert torch.equal(split_model.finish(state), split_model(*args))


def test_the_text_stream_is_diffusers_own_on_padded_tokens_too(make_transformer, make_batch):
    """Nothing reads them, but equal is easier to trust than equivalent."""
    model, args = make_transformer(), arguments(make_batch([3, 0, 5], pad=2))
    states = []
    for stock_attention in (True, False):
        split_model = SplitMochi(model, stock_attention=stock_attention)
        states.append(split_model.run(split_model.embed(*args), 0, 2))
    torch.testing.assert_close(states[1].text, states[0].text, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(states[1].vision, states[0].vision, rtol=1e-5, atol=1e-6)


def test_padding_and_neighbours_change_nothing(make_transformer, make_batch):
    split_model = SplitMochi(make_transformer())
    batch, padded = make_batch([3, 0, 5]), make_batch([3, 0, 5], pad=4)
    padded.text[~padded.text_mask] = 100.0  # what lies in padding must not be read
    want = split_model(*arguments(batch))
    torch.testing.assert_close(split_model(*arguments(padded)), want)
    x, timestep, captions = arguments(batch)
    for row, length in enumerate(captions.lengths):
        one = slice(row, row + 1)
        alone = split_model(x[one], timestep[one], Captions(captions.text[one], captions.mask[one], (length,)))
        torch.testing.assert_close(alone, want[one])


class _Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


#: Each makes the host wait for the device.
WAITS = {f"aten::{name}" for name in ("nonzero", "item", "_local_scalar_dense", "is_nonzero", "equal", "masked_select",
                                      "unique_dim", "_unique2", "index.Tensor")}  # fmt: skip


def _operations(split_model, batch):
    with _Operations() as seen, torch.no_grad():
        split_model(*arguments(batch))
    return seen.names


def test_no_wait_for_the_device_and_no_loop_over_the_batch(make_transformer, make_batch):
    model = make_transformer()
    counts = {len(_operations(SplitMochi(model), make_batch(lengths))) for lengths in ([2, 1], [2, 0, 1, 1, 2, 0, 1])}
    assert len(counts) == 1, "work is done sample by sample"
    assert not WAITS & set(_operations(SplitMochi(model), make_batch([2, 0, 1])))
    assert WAITS & set(_operations(SplitMochi(model, stock_attention=True), make_batch([2, 0, 1]))), (
        "the probe sees none"
    )


def test_captions_of_one_length_need_no_mask(make_batch):
    batch = make_batch([4, 4], pad=3)
    layout = TokenLayout.of((2, 2, 3), batch.text_lengths, batch.text_mask)
    assert layout.key_mask is None and layout.text_tokens == 4 and layout.num_vision == 12
    batch = make_batch([4, 1], pad=3)
    layout = TokenLayout.of((2, 2, 3), batch.text_lengths, batch.text_mask)
    assert layout.key_mask.sum(dim=1).tolist() == [16, 13] and layout.key_mask.shape == (2, 16)


def test_attention_is_seen_and_changed_only_inside(make_transformer, make_batch):
    split_model, args = SplitMochi(make_transformer()), arguments(make_batch([3, 3]))
    want, seen = split_model(*args), []

    def written_out(q, k, v, call):
        seen.append((call.layer, tuple(q.shape), call.layout.text_tokens))
        weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
        return (weights @ v.double()).to(v.dtype)

    with split_model.attention({0: written_out, 2: written_out}):
        torch.testing.assert_close(split_model(*args), want)
    assert seen == [(0, (2, 2, 12 + 3, 8), 3), (2, (2, 2, 12 + 3, 8), 3)]
    with split_model.attention({1: lambda q, k, v, call: torch.zeros_like(v)}):
        assert not torch.allclose(split_model(*args), want)

    def broken(q, k, v, call):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), split_model.attention({1: broken}):
        split_model(*args)
    assert torch.equal(split_model(*args), want)
    with pytest.raises(ValueError, match=r"layers \[3\].*0 \.\. 2"), split_model.attention({3: written_out}):
        pass
    with pytest.raises(ValueError, match="stock_attention"), \
            SplitMochi(make_transformer(), stock_attention=True).attention({0: dense_attention}):  # fmt: skip
        pass


def test_output_projection_splits_by_head(make_transformer, make_batch):
    split_model = SplitMochi(make_transformer())
    projection = split_model.output_projection(1)
    assert projection.shape == (2, 8, 16)
    attn = split_model.transformer.transformer_blocks[1].attn1
    heads = torch.randn(5, 2, 8)
    want = attn.to_out[0](heads.flatten(1))
    torch.testing.assert_close(torch.einsum("nhd,hdo->no", heads, projection) + attn.to_out[0].bias, want)


def test_checkpointed_blocks_give_the_same_gradients(make_transformer, make_batch):
    model, args = make_transformer(), arguments(make_batch())
    plain = gradients(model, SplitMochi(model)(*args))
    plain = {name: grad.clone() for name, grad in plain.items()}
    saved = gradients(model, SplitMochi(model, checkpoint_blocks=True)(*args))
    for name, grad in saved.items():
        assert torch.equal(grad, plain[name]), name


def test_state_can_be_moved_and_cut(make_transformer, make_batch):
    split_model = SplitMochi(make_transformer())
    state = split_model.embed(*arguments(make_batch()))
    assert state.vision.requires_grad and state.rope[0].requires_grad
    cut = state.detach()
    assert not any(t.requires_grad for t in (cut.vision, cut.text, cut.temb, *cut.rope))
    assert cut.map(lambda t: t.to("meta")).layout.key_mask.device.type == "meta"


def test_bad_input_is_named(make_transformer, make_batch):
    split_model = SplitMochi(make_transformer())
    x, timestep, captions = arguments(make_batch())
    with pytest.raises(ValueError, match=r"3 x 6.*multiples of 1 x 2 x 2.*multiples of 16"):
        split_model(x[:, :, :, :3], timestep, captions)
    with pytest.raises(ValueError, match="one length per sample"):
        split_model(x, timestep, replace(captions, lengths=captions.lengths[:-1]))
    with pytest.raises(ValueError, match="none above the padded length"):
        split_model(x, timestep, replace(captions, lengths=(3, 0, 6)))
    assert text_lengths_of(captions.mask) == captions.lengths
    with pytest.raises(ValueError, match="with gaps"):
        text_lengths_of(torch.tensor([[True, False, True]]))


def test_stock_attention_puts_diffusers_processor_back(make_transformer):
    split_model = SplitMochi(make_transformer())
    SplitMochi(split_model.transformer, stock_attention=True)
    assert all(isinstance(b.attn1.processor, MochiAttnProcessor2_0) for b in split_model.transformer.transformer_blocks)
