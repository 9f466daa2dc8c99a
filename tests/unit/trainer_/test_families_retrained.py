"""The main job on every family: retraining learns and resumes, sinks are found, masking does what it says."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Batch, EmptyCaption, Sample
from tests.support.masking_brute_force import brute_force
from tests.support.tiny_families import TINY, make
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.probe_set import ProbeSet
from trainer.callbacks.sinks import SinkFrequency
from trainer.distillation import ObjectivePhase
from trainer.models.families import FAMILIES
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig

NAMES = sorted(TINY)
GRID = (3, 4, 6)
SIGMAS = (0.1, 0.3)
#: Where the sink is planted: block, head, and the component of the slowest rotation in every family's tables.
LAYER, HEAD, COMPONENT = 2, 1, 2


@pytest.fixture(params=NAMES)
def base(request, tmp_path):
    """A base of each family as diffusers saves it."""
    make(request.param, 5).save_pretrained(tmp_path / "base" / "transformer")
    return tmp_path / "base"


def build(base, init="keep", **how):
    how.setdefault("caption_dropout", 0.0)
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(last=2, init=init, seed=1), **how)
    module.check()
    module.build("cpu")
    return module


def encoded_empty(module):
    """An encoded empty caption, longer than those of `samples`; None for a family without one."""
    facts, generator = module.split_model.own_facts, torch.Generator().manual_seed(9)
    if facts.empty_caption != "encoded":
        return None
    pooled = None if facts.pooled_width is None else torch.randn(facts.pooled_width, generator=generator)
    return EmptyCaption(torch.randn(5, facts.text_width, generator=generator), pooled)


def samples(module, number, marks=(), seed=0):
    """Samples that fit a module's base; `marks` gives those with one patch that stands out, and where."""
    facts, generator = module.split_model.own_facts, torch.Generator()
    generator.manual_seed(seed)
    mark = 30.0 * torch.randn(facts.channels, 2, 2, generator=generator)
    found = []
    for index in range(number):
        latent = torch.randn(facts.channels, *GRID, generator=generator)
        if index < len(marks):
            frame, y, x = marks[index]
            latent[:, frame, y : y + 2, x : x + 2] += mark
        text = torch.randn(facts.text_tokens or 3, facts.text_width, generator=generator)
        pooled = None if facts.pooled_width is None else torch.randn(facts.pooled_width, generator=generator)
        found.append(Sample(latent, text, f"clip-{index}", index, pooled=pooled))
    return found


def test_retraining_learns_and_resumes_bit_for_bit(base, fit, tmp_path):
    """Two epochs at once, and one that a checkpoint carries on: the same weights; what is frozen stays."""
    optim = OptimConfig(lr=3e-3, warmup_steps=1, weight_decay=0.0)

    def fresh():
        module = build(base, init="dit", optim=optim, ema_decay=0.5)
        return module, [Batch.collate(samples(module, 4))] * 4

    module, batches = fresh()
    noise = module.flow.held_out_noise(batches[0].uids, batches[0].latents.shape[1:])
    sigma = torch.full((4,), 0.5)
    frozen = {n: p.clone() for n, p in module.split_model.transformer.named_parameters() if not p.requires_grad}
    before = float(module.losses(batches[0], noise, sigma).mean())
    fit(module, batches, max_steps=-1, max_epochs=2)
    after = float(module.losses(batches[0], noise, sigma).mean())
    assert after < before
    own = dict(module.split_model.transformer.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in frozen.items())
    half, batches = fresh()
    fit(half, batches, max_steps=-1).save_checkpoint(tmp_path / "half.ckpt")
    rest, batches = fresh()
    fit(rest, batches, max_steps=-1, max_epochs=2, resume=tmp_path / "half.ckpt")
    for name, value in module.retrained_parameters().items():
        assert torch.equal(rest.retrained_parameters()[name], value), name
        assert torch.equal(rest.ema.average[name], module.ema.average[name]), name


@torch.no_grad()
def measure(callback, module, samples):
    callback.check(module)
    probes = ProbeSet(samples, SIGMAS, seed=1)
    tables = {}
    for batch, _ in probes.share(0, 1):
        for name, found in callback.observe(module, batch).items():
            table = tables.setdefault(name, np.zeros((len(samples), len(SIGMAS), *found.shape[1:])))
            table[list(batch.prompts), list(batch.strata)] = found.double().numpy()
    return callback.summarise(module, probes, tables)


@torch.no_grad()
def plant(module, marked):
    """Makes one head attend to the marked token of every sample, whatever the query.

    All queries of the head are one constant vector. Its keys lie along the same vector: positive for the marked token,
    negative for the others, by a plane that tells them apart in the attention's input. Norms leave the sign.
    """
    split_model = module.split_model
    block = split_model.blocks[LAYER]
    attn = split_model.attention_module(block)
    inputs, targets = [], []

    def see(_, args, kwargs):
        text = kwargs.get("encoder_hidden_states")  # of a block that projects text by the same weights
        parts = [kwargs.get("hidden_states", args[0] if args else None), *([] if text is None else [text])]
        inputs.append(torch.cat(parts, dim=1))

    hook = attn.register_forward_pre_hook(see, with_kwargs=True)
    for batch, _ in ProbeSet([sample for sample, _ in marked], SIGMAS, seed=1).share(0, 1):
        module.velocity(module.process.mix(batch.batch.latents, batch.noise, batch.sigma), batch.sigma, batch.batch)
        for prompt in batch.prompts:
            target = -torch.ones(inputs[-1].shape[1])
            target[marked[prompt][1]] = 1.0
            targets.append(target)
    hook.remove()
    x = torch.cat([each.flatten(0, 1) for each in inputs]).double()
    y = torch.cat(targets).double()
    x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    plane = torch.linalg.lstsq(x, (y * (1 + 4 * (y > 0)))[:, None], driver="gelsd").solution[:, 0]
    found = x @ plane
    assert found[y > 0].min() > found[y < 0].max(), "the marked tokens cannot be told apart by a plane"
    threshold = (found[y > 0].min() + found[y < 0].max()) / 2
    width = attn.to_q.out_features // attn.heads
    rows, at = slice(HEAD * width, (HEAD + 1) * width), HEAD * width + COMPONENT
    pairs = [(attn.to_q, attn.to_k)]
    if getattr(attn, "add_q_proj", None) is not None:
        pairs.append((attn.add_q_proj, attn.add_k_proj))
    for query, key in pairs:
        for layer in (query, key):
            layer.weight[rows] = 0.0
            layer.bias[rows] = 0.0
        query.bias[at] = 100.0
    attn.to_k.weight[at] = 100.0 * plane[:-1].float()
    attn.to_k.bias[at] = 100.0 * float(plane[-1] - threshold)
    for norm in (attn.norm_q, attn.norm_k):
        norm.weight.fill_(1.0)
        norm.weight[(COMPONENT if norm.weight.numel() == width else at)] = 3.0
        if getattr(norm, "bias", None) is not None:
            norm.bias.zero_()


# Mochi's attention has no biases: tests/unit/trainer_/callbacks/test_sinks.py plants by other means.
@pytest.mark.parametrize("base", [name for name in NAMES if name != "mochi"], indirect=True)
def test_a_planted_sink_is_found_at_its_token_and_no_other(base):
    module = build(base)
    marks = [(0, 0, 0), (1, 2, 4), (2, 0, 2), (1, 2, 0), (0, 2, 2), (2, 2, 4)]
    drawn = samples(module, len(marks), marks)
    callback = SinkFrequency(prompts=len(marks), sigmas=SIGMAS, layers="all")
    before = measure(callback, module, drawn)
    assert not before["consistent"].any()
    tokens = [(frame * 2 + y // 2) * 3 + x // 2 for frame, y, x in marks]
    plant(module, list(zip(drawn, tokens, strict=True)))
    found = measure(SinkFrequency(prompts=len(marks), sigmas=SIGMAS, layers="all"), module, drawn)
    assert np.argwhere(found["consistent"]).tolist() == [[LAYER, HEAD]]
    at = int(np.argmin(np.abs(found["eps"] - found["default_eps"])))
    assert (found["key"][:, :, LAYER, HEAD, at] == np.array(tokens)[:, None]).all()


def test_masking_is_that_of_stored_float64_weights(base):
    module = build(base)
    callback = MaskingRobustness(prompts=2, sigmas=SIGMAS, ratios=(0.5,), scopes=("retrained",))
    drawn = samples(module, 2)
    got = measure(callback, module, drawn)
    with torch.no_grad():
        distortion, increase, dense_loss, realised = brute_force(module, ProbeSet(drawn, SIGMAS, seed=1), [2, 3], 0.5)
    assert got["distortion"][0, 0] == pytest.approx(distortion, rel=0.05)
    assert got["loss_increase"][0, 0] == pytest.approx(increase, rel=0.05, abs=1e-3 * dense_loss)
    assert got["realised_ratio"][0, 0] == pytest.approx(realised, abs=0.02)
    assert got["dense_loss"] == pytest.approx(dense_loss, rel=1e-4)


def test_captions_are_dropped_as_the_family_has_it(base):
    module = build(base)
    facts = module.split_model.own_facts
    module.flow.caption_dropout = 1.0
    batch, empty = Batch.collate(samples(module, 2)), encoded_empty(module)
    module.empty_caption = empty
    dropped = module.drop_captions(batch, 0)
    if empty is None:
        assert not dropped.text.any() and batch.text.any()
        assert dropped.text_lengths == ((0, 0) if facts.empty_caption == "nothing" else batch.text_lengths)
    else:
        expected = Batch.collate([replace(s, text=empty.text, pooled=empty.pooled) for s in samples(module, 2)])
        noise, sigma = torch.randn(batch.latents.shape), torch.tensor([0.3, 0.6])
        assert torch.equal(module.losses(dropped, noise, sigma), module.losses(expected, noise, sigma))
        assert not torch.equal(module.losses(dropped, noise, sigma), module.losses(batch, noise, sigma))
    assert torch.isfinite(module.losses(dropped, torch.randn(batch.latents.shape), torch.tensor([0.3, 0.6]))).all()


def test_every_family_is_covered():
    assert {TINY[name][0].__name__ for name in NAMES} == set(FAMILIES)


def drawn(module):
    batch = Batch.collate(samples(module, 3))
    return batch, module.flow.held_out_noise(batch.uids, batch.latents.shape[1:]), torch.tensor([0.2, 0.5, 0.9])


def test_options_change_how_a_step_is_computed_not_what(base, monkeypatch):
    """Checkpointing and compilation give the same bits; a bfloat16 trunk its rounding."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    eager = build(base, init="torch")
    want = eager.losses(*drawn(eager))
    want.sum().backward()
    gradients = {name: p.grad for name, p in eager.retrained_parameters().items()}
    for how in ({"checkpoint_head": True}, {"compile": "both"}):
        module = build(base, init="torch", **how)
        got = module.losses(*drawn(module))
        got.sum().backward()
        assert torch.equal(got, want), how
        assert all(torch.equal(p.grad, gradients[name]) for name, p in module.retrained_parameters().items()), how
    torch._dynamo.reset()
    narrow = build(base, init="torch", trunk_dtype="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        got = narrow.losses(*drawn(narrow))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0)
    assert not torch.equal(got, want)


@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
def test_a_teacher_teaches_its_own_blocks_nothing_and_an_identity_everything(base, trunk_dtype):
    phase = ObjectivePhase(blocks=1.0)
    for init, expected in (("keep", 0.0), ("dit", 1.0)):
        module = build(base, init=init, trunk_dtype=trunk_dtype, objective=(phase,))
        with torch.autocast("cpu", torch.bfloat16, enabled=trunk_dtype == "bfloat16"):
            losses = module.objective_losses(*drawn(module), phase)
        # A fresh block is the identity, whose error is the whole change, up to bfloat16's rounding.
        tolerance = 0.0 if expected == 0.0 and trunk_dtype == "float32" else 1e-5 if trunk_dtype == "float32" else 2e-3
        torch.testing.assert_close(losses, torch.full((3,), expected), rtol=0, atol=tolerance)
    if trunk_dtype == "bfloat16":
        assert_rounded_as_by_diffusers(module, base)


def assert_rounded_as_by_diffusers(module, base):
    """Weights and dtypes of the teacher's blocks, but for LayerNorms."""
    kind = type(module.split_model.transformer)
    stock = module.split_model.blocks_of(kind.from_pretrained(base / "transformer", torch_dtype=torch.bfloat16))
    for layer, block in zip(module.blocks, module.teacher.blocks, strict=True):
        norms = tuple(name for name, each in block.named_modules() if isinstance(each, torch.nn.LayerNorm))
        for name, p in stock[layer].named_parameters():
            got = block.get_parameter(name)
            if name.rpartition(".")[0] not in norms:
                assert got.dtype == p.dtype and torch.equal(got, p), name


def test_probes_without_captions_are_what_training_leaves_out(base):
    module = build(base)
    facts = module.split_model.own_facts
    drawn_samples = samples(module, 2)
    module.empty_caption = empty = encoded_empty(module)
    probes = ProbeSet(
        drawn_samples, SIGMAS, seed=1, unconditional=True, keep_lengths=facts.empty_caption == "zeros", empty=empty
    )
    batch = next(probes.share(0, 1))[0].batch
    module.flow.caption_dropout = 1.0
    wanted = module.drop_captions(Batch.collate(drawn_samples), 0)
    assert set(batch.text_lengths) == set(wanted.text_lengths) and bool(batch.text.any()) == (empty is not None)
    if empty is not None:
        assert torch.equal(batch.text[0], wanted.text[0])
        assert wanted.pooled is None or torch.equal(batch.pooled[0], wanted.pooled[0])
