"""What holds for the transformers of all families: composition, attention as it is seen, fresh blocks, gradients."""

import contextlib
import copy
import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from tests.support.tiny_families import TINY, inputs, make, stock_forward
from trainer.models.families import FAMILIES, family_of, split_model_of
from trainer.models.layout import dense_attention
from trainer.models.load import load_transformer, read_config, read_facts
from trainer.surgery import SurgeryConfig, apply_surgery, reinitialise

NAMES = sorted(TINY)
LENGTHS = [(3, 3), (5, 2), (1,), (4, 1, 3)]
#: Every family's attention sites.
SITES = [(name, site) for name in NAMES for site in FAMILIES[TINY[name][0].__name__].attention_sites]


def test_every_family_has_a_tiny_model():
    assert {kind.__name__ for kind, _ in TINY.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3), pad=st.integers(0, 2), frames=st.integers(1, 4),
    height=st.sampled_from([2, 4]), width=st.sampled_from([2, 6]), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_parts_compose_to_diffusers_own_forward(name, lengths, pad, frames, height, width, seed):
    model = make(name, seed)
    grid = (frames, height, width) if name != "cogvideox-2b" else (3, 4, 6)
    args = inputs(model, lengths, grid=grid, pad=pad, seed=seed)
    with torch.no_grad():
        stock = split_model_of(model, stock_attention=True)
        want = stock_forward(stock, **args)
        assert torch.equal(stock(**args), want)
        got = split_model_of(model)(**args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gradients_are_those_of_diffusers_own_forward(name, lengths):
    model = make(name)
    args = inputs(model, lengths)
    found = []
    for stock in (True, False):
        split_model = split_model_of(model, stock_attention=stock, checkpoint_blocks=not stock)
        model.zero_grad()
        (stock_forward(split_model, **args) if stock else split_model(**args)).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    largest = max(float(grad.abs().max()) for grad in found[0].values())
    for key, want in found[0].items():
        torch.testing.assert_close(found[1][key], want, rtol=1e-4, atol=1e-5 * largest, msg=key)


@torch.no_grad()
def stock_outputs(name, site, args):
    """Layer -> what diffusers' own attention at a site gives to vision tokens, (B, N, D), in float64."""
    split_model, outs = split_model_of(make(name).double(), stock_attention=True), {}
    for layer, block in enumerate(split_model.blocks):
        split_model.attention_module(block, site).register_forward_hook(
            lambda _, args, out, layer=layer: outs.update({layer: out if isinstance(out, torch.Tensor) else out[0]})
        )
    stock_forward(split_model, **in_dtype(args, torch.float64))
    return outs


def in_dtype(args, dtype):
    """Arguments of `inputs` with latents and captions of a dtype."""
    captions = args["captions"]
    pooled = None if captions.pooled is None else captions.pooled.to(dtype)
    return args | {
        "x": args["x"].to(dtype), "captions": dataclasses.replace(captions, text=captions.text.to(dtype), pooled=pooled)
    }  # fmt: skip


@pytest.mark.parametrize(("name", "site"), SITES)
def test_q_k_v_at_a_site_reproduce_the_attention_output(name, site):
    """softmax(q k / sqrt(d)) v in float64, projected, is what diffusers' attention gives to vision tokens."""
    model = make(name)
    split_model, seen, args = split_model_of(model), {}, inputs(model, (4, 4))

    def attend(q, k, v, call):
        weights = (q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        seen[call.layer] = (weights @ v.double(), k.shape[2], call)
        return dense_attention(q, k, v, call)

    with torch.no_grad(), split_model.attention(dict.fromkeys(range(split_model.num_blocks), attend), site=site):
        split_model(**args)
    assert sorted(seen) == list(range(4))
    vision, text = 3 * 2 * 3, {"cross": 512, "self": 0}.get(site, args["captions"].text.shape[1])
    outs = stock_outputs(name, site, args)
    for layer, (want, keys, call) in seen.items():
        layout, module = call.layout, split_model.attention_module(split_model.blocks[layer], site)
        assert call.site == site and layout.text_lengths == args["captions"].lengths
        assert (layout.num_vision, layout.text_tokens) == (vision, text)
        assert want.shape[2] == vision + (text if site == "joint" else 0)
        assert keys == (text if site == "cross" else vision + text)
        merged = want[:, :, :vision].transpose(1, 2).flatten(2)
        if module.to_out is not None:  # HunyuanVideo's single blocks project attention and MLP together
            merged = copy.deepcopy(module.to_out[0]).double()(merged)
        torch.testing.assert_close(merged, outs[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_output_projection_is_split_by_head(name):
    split_model = split_model_of(make(name))
    assert all(len(split_model.output_projection(layer)) == 2 for layer in range(4))
    module = split_model.vision_output(split_model.blocks[0])
    projection = split_model.output_projection(0)
    out = torch.randn(2, 2, 5, projection.shape[1])
    bias = 0 if module.bias is None else module.bias
    found = torch.einsum("bhnd,hdw->bnw", out, projection) + bias
    torch.testing.assert_close(found, module(out.transpose(1, 2).flatten(2)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "site"), SITES)
def test_a_function_at_a_site_replaces_attention_also_when_it_is_recomputed(name, site):
    model, calls = make(name), []
    args = inputs(model, (3, 3))

    def halved(q, k, v, call):
        calls.append((call.site, call.layer))
        return 0.5 * dense_attention(q, k, v, call)

    def gradients(checkpoint):
        split_model = split_model_of(model, checkpoint_blocks=checkpoint)
        model.zero_grad()
        with split_model.attention({1: halved, 2: halved}, site=site):
            out = split_model(**args)
        out.square().mean().backward()  # outside: the recomputation must find the functions of the forward pass
        return out, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    want, expected = gradients(checkpoint=False)
    assert calls == [(site, 1), (site, 2)]
    assert not torch.allclose(want, split_model_of(model)(**args), rtol=1e-3)
    found, got = gradients(checkpoint=True)
    assert calls[2:] == [(site, 1), (site, 2), (site, 2), (site, 1)]
    assert torch.equal(found, want)
    assert all(torch.equal(got[key], gradient) for key, gradient in expected.items())


@pytest.mark.parametrize(("name", "site"), SITES)
def test_attention_at_a_site_is_restored_when_something_raises(name, site):
    model = make(name)
    split_model, args = split_model_of(model), inputs(model, (3, 3))

    def broken(q, k, v, call):
        raise RuntimeError("no attention")

    with torch.no_grad():
        want = split_model(**args)
        with pytest.raises(RuntimeError, match="no attention"), split_model.attention({1: broken}, site=site):
            split_model(**args)
        assert torch.equal(split_model(**args), want)


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_own_forward_runs_with_processors_that_observe(name):
    """As its pipelines call it: without a token layout."""
    model = make(name)
    split_model, args, seen = split_model_of(model), inputs(model, (3, 3)), []

    def attend(q, k, v, call):
        seen.append((call.site, k.shape[2]))
        return dense_attention(q, k, v, call)

    with torch.no_grad(), contextlib.ExitStack() as stack:
        want = split_model(**args)
        for site in split_model.attention_sites:
            stack.enter_context(split_model.attention({0: attend}, site=site))
        got = stock_forward(split_model, **args)
        observed, seen = seen.copy(), []
        split_model(**args)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert observed == seen and [site for site, _ in seen] == list(split_model.attention_sites)


@pytest.mark.parametrize("name", NAMES)
def test_a_site_that_the_family_lacks_is_refused(name):
    split_model = split_model_of(make(name))
    own = list(split_model.attention_sites)
    for site in {"joint", "self", "cross"} - set(own):
        message = f"got attention site '{site}' for the family {split_model.family}, expected one of {own}"
        with pytest.raises(ValueError, match=re.escape(message)), split_model.attention({}, site=site):
            pass


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("first", [1, 2, 3])
def test_a_fresh_block_is_the_identity_and_learns(name, first):
    model = make(name)
    split_model, args = split_model_of(model), inputs(model, (3, 3))
    blocks = tuple(range(first, 4))
    apply_surgery(split_model, blocks, SurgeryConfig(blocks=list(blocks), init="dit", seed=3))
    with torch.no_grad():
        state = split_model.run(split_model.embed(**args), 0, first)
        assert all(not tensor.requires_grad for tensor in (state.vision, state.text, state.temb))
        after = split_model.run(state, first, 4)
        assert torch.equal(after.vision, state.vision)
    split_model.finish(split_model.run(state, first, 4)).square().mean().backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    inside = {id(p) for i in blocks for p in split_model.blocks[i].parameters()}
    assert trained == {n for n, p in model.named_parameters() if id(p) in inside}
    assert any(p.grad is not None and p.grad.any() for p in split_model.blocks[first].parameters())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["dit", "torch", "normal"])
def test_every_weight_of_a_block_is_drawn_from_the_seed(name, kind):
    one, two = make(name, 1), make(name, 2)
    for layer in range(4):
        a, b = split_model_of(one).blocks[layer], split_model_of(two).blocks[layer]
        for block in (a, b):
            reinitialise(block, kind, 5, family=type(split_model_of(one)))
        for (key, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert torch.equal(p, q), key


@pytest.mark.parametrize("name", NAMES)
def test_a_base_of_any_family_is_loaded_whole_or_refused(name, tmp_path):
    model = make(name, 4)
    model.save_pretrained(tmp_path / "transformer")
    config = read_config(str(tmp_path))
    assert read_facts(config).num_blocks == 4 and isinstance(model, family_of(config).transformer_class)
    for dtype, first in ((torch.float32, None), (torch.bfloat16, 2)):
        loaded = load_transformer(str(tmp_path), dtype=dtype, float32_from=first)
        split_model = split_model_of(loaded)
        own = {id(p) for i in range(2) for p in split_model.blocks[i].parameters()}
        for key, want in model.named_parameters():
            got = loaded.get_parameter(key)
            if first is None or (id(got) not in own and key.startswith(("proj_out", "norm_out"))):
                assert got.dtype == torch.float32 and torch.equal(got, want), key
        for block in split_model.blocks[2:]:
            assert {p.dtype for p in block.parameters()} == {torch.float32}
    path = next((tmp_path / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(ValueError, match="damaged or truncated"):
        load_transformer(str(tmp_path))
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"_class_name": "LTXVideoTransformer"}))
    with pytest.raises(ValueError, match=r"'LTXVideoTransformer', expected .*'MochiTransformer3DModel' or 'WanTrans"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_bfloat16_model_is_that_of_diffusers(name, tmp_path):
    """Dtypes of all weights; output, and what the trunk gives to the first retrained block, bit for bit."""
    model = make(name, 4)
    if name == "mochi":  # whose frequencies stay float32 in front of a float32 head: with these, that changes nothing
        model.pos_frequencies.copy_(model.pos_frequencies.bfloat16())
    model.save_pretrained(tmp_path / "transformer")
    stock = type(model).from_pretrained(tmp_path / "transformer", torch_dtype=torch.bfloat16)
    for base, device in ((tmp_path, "cpu"), (tmp_path, "meta"), (tmp_path / "transformer" / "config.json", "cpu")):
        loaded = load_transformer(str(base), dtype=torch.bfloat16, device=device)
        for key, tensor in [*stock.named_parameters(), *stock.named_buffers()]:
            assert getattr(loaded.get_submodule(key.rpartition(".")[0]), key.rpartition(".")[2]).dtype == tensor.dtype
    args = in_dtype(inputs(model, (4, 2)) | {"timestep": torch.tensor([987.0, 4.0])}, torch.bfloat16)
    before = {}
    split_stock = split_model_of(stock, stock_attention=True)
    split_stock.blocks[2].register_forward_pre_hook(
        lambda _, args, kwargs: before.update(vision=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    want = stock_forward(split_stock, **args)
    whole = load_transformer(str(tmp_path), dtype=torch.bfloat16)
    assert torch.equal(split_model_of(whole, stock_attention=True)(**args), want)
    trunk = split_model_of(load_transformer(str(tmp_path), dtype=torch.bfloat16, float32_from=2), stock_attention=True)
    assert torch.equal(trunk.run(trunk.embed(**args), 0, 2).vision, before["vision"])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("wan", {"image_dim": 8}, "expected a Wan 2.1 of text to video"),
        ("hunyuan", {"image_condition_type": "token_replace"}, "HunyuanVideo of text to video"),
        ("cogvideox-5b", {"patch_size_t": 2}, "CogVideoX 1.0 of text to video"),
        ("wan", {"in_channels": 36}, "in_channels 36 and out_channels 4, expected them equal: a Wan 2.1 of text"),
        ("cogvideox-2b", {"in_channels": 8}, "expected them equal: a CogVideoX of text to video"),
    ],
)
def test_variants_that_take_an_image_are_refused(name, change, message):
    kind, config = TINY[name]
    whole = {"_class_name": kind.__name__, **dict(make(name).config), **config, **change}
    with pytest.raises(ValueError, match=message.replace(".", r"\.").replace(r"\. ", ". ")):
        read_facts(whole)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("hunyuan", {"pooled": None}, "pooled captions of width none, expected 8"),
        ("hunyuan", {"lengths": (0, 3)}, "caption without tokens"),
        ("cogvideox-2b", {"lengths": (5, 4)}, r"captions of \[4, 5\] tokens, expected 5 each"),
        ("wan", {"text": torch.zeros(2, 513, 16)}, "padded to 513 tokens, expected at most 512"),
        ("wan", {"x": torch.zeros(2, 4, 3, 4, 5)}, "got a latent of 3 x 4 x 5"),
    ],
)
def test_inputs_that_do_not_fit_are_named(name, change, message):
    model = make(name)
    args = inputs(model, (3, 3))
    args["captions"] = dataclasses.replace(args["captions"], **{key: change[key] for key in change if key != "x"})
    with pytest.raises(ValueError, match=message):
        split_model_of(model).embed(**args | {key: change[key] for key in change if key == "x"})


def test_a_process_serves_real_tensors_after_fake_ones():
    """`reblock plan` and a fit in one process: nothing made under a fake mode may be kept."""
    split_model = split_model_of(make("cogvideox-2b"))
    with FakeTensorMode():
        split_model.process.mix(torch.empty(2, 3), torch.empty(2, 3), torch.empty(2))
    z, noise = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(split_model.process.mix(z, noise, torch.ones(2)), noise)
