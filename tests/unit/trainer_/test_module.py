"""The training step: trunk without autograd, gradients, precision, captions; faults before anything is loaded."""

from pathlib import Path

import pytest
import torch

from trainer.module import OptimConfig, SurgeryConfig

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:In CPU autocast")


def loss_of(module, batch):
    flow = module.flow
    noise, sigma = flow.noise(0, batch.uids, batch.latents.shape[1:]), flow.sigma(0, batch.uids)
    return module.losses(batch, noise, sigma).mean()


def gradients(module, batch):
    module.zero_grad(set_to_none=True)
    loss_of(module, batch).backward()
    return {name: p.grad.clone() for name, p in module.retrained_parameters().items()}


def saved_bytes(function) -> int:
    """Bytes of distinct storages that autograd keeps while `function` runs."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = function()
    assert out is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


# -- trunk and head --------------------------------------------------------------------------------------------------


def test_the_trunk_makes_no_autograd_node(make_module, make_batch):
    module, batch = make_module(), make_batch()
    module.split_model.transformer.pos_frequencies.requires_grad_(True)  # not even if a leaf outside was left trainable
    x, sigma = batch.latents, module.flow.sigma(0, batch.uids)
    states = []
    assert saved_bytes(lambda: states.append(module.trunk(x, sigma, batch)) or states) == 0
    state = states[0]
    for tensor in (state.vision, state.text, state.temb, *state.rope):
        assert tensor.grad_fn is None and not tensor.requires_grad
    assert saved_bytes(lambda: module.head(state)) > 0


def test_what_a_step_keeps_does_not_grow_with_the_trunk(make_module, make_transformer, make_batch, tmp_path):
    kept, weights = {}, {}
    for depth in (3, 9):
        make_transformer(num_layers=depth).save_pretrained(tmp_path / str(depth))
        module = make_module(base=tmp_path / str(depth), surgery=SurgeryConfig(last=2, init="torch"))
        kept[depth] = saved_bytes(lambda module=module: loss_of(module, make_batch()))
        weights[depth] = len(module.retrained_parameters())
    assert kept[3] == kept[9] > 0 and weights[3] == weights[9]
    # The trap: one trainable leaf outside puts every block back into the graph.
    module.split_trunk = False
    module.split_model.transformer.pos_frequencies.requires_grad_(True)
    assert saved_bytes(lambda: loss_of(module, make_batch())) > 2 * kept[9]


@pytest.mark.parametrize("blocks", [(2,), (0, 2), (0,), (1,)])
def test_gradients_are_those_of_the_whole_model(make_module, make_batch, blocks):
    """Any list of blocks: the trunk ends at the first, frozen blocks in between stay frozen and pass gradients on."""
    module, batch = make_module(blocks=blocks), make_batch()
    assert module.first == blocks[0]
    split = gradients(module, batch)
    assert {int(name.split(".")[1]) for name in split} == set(blocks)
    frozen = [p for name, p in module.split_model.transformer.named_parameters() if name not in split]
    assert all(p.grad is None and not p.requires_grad for p in frozen)
    module.split_trunk = False
    whole = gradients(module, batch)
    stock = make_module(blocks=blocks, stock_attention=True, split_trunk=False)
    reference = gradients(stock, batch)
    for name, grad in split.items():
        assert torch.equal(grad, whole[name]), name
        assert (grad - reference[name]).norm() <= 1e-4 * reference[name].norm() + 1e-9, name
    # Some weights of the last block reach only its unused text stream; all others learn.
    silent = {name for name, grad in split.items() if not grad.any()}
    assert all(name.startswith("transformer_blocks.2.") for name in silent)


def test_checkpointed_head_gives_the_same_gradients_and_keeps_less(make_module, make_batch):
    batch = make_batch([5, 2], grid=(3, 8, 8))
    plain, saving = make_module(), make_module(checkpoint_head=True)
    want, got = gradients(plain, batch), gradients(saving, batch)
    assert all(torch.equal(got[name], grad) for name, grad in want.items())
    assert saved_bytes(lambda: loss_of(saving, batch)) < 0.5 * saved_bytes(lambda: loss_of(plain, batch))


def test_bfloat16_trunk_on_a_cpu(make_module, make_batch):
    module, batch = make_module(trunk_dtype="bfloat16"), make_batch()
    model = module.split_model.transformer
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert {p.dtype for b in model.transformer_blocks[1:] for p in b.parameters()} == {torch.float32}
    assert model.pos_frequencies.dtype == model.proj_out.weight.dtype == torch.float32
    state = module.trunk(batch.latents, module.flow.sigma(0, batch.uids), batch)
    assert {t.dtype for t in (state.vision, state.text, state.temb, *state.rope)} == {torch.float32}
    assert state.layout.key_mask.dtype == torch.bool
    exact = make_module()
    torch.testing.assert_close(loss_of(module, batch), loss_of(exact, batch), rtol=0.02, atol=0)
    assert all(torch.isfinite(grad).all() for grad in gradients(module, batch).values())
    with pytest.raises(ValueError, match="got trunk_dtype 'float16'"):
        make_module(build=False, trunk_dtype="float16")
    with pytest.raises(ValueError, match="train_outside"):
        make_module(build=False, trunk_dtype="bfloat16", surgery=SurgeryConfig(last=3, train_outside=True))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
def test_fit_learns_under_every_precision(make_module, make_batch, fit, precision, trunk_dtype, make_recorder):
    module = make_module(trunk_dtype=trunk_dtype, optim=OptimConfig(lr=3e-3, warmup_steps=1), caption_dropout=0.0)
    before = module.base_fingerprint
    recorder = make_recorder()
    fit(module, [make_batch(uids=[0, 1, 2])] * 25, callbacks=[recorder], precision=precision)
    losses = [m["train/loss"] for m in recorder.metrics]
    assert losses[-1] < 0.9 * losses[0] and module.skipped == 0
    assert {p.dtype for p in module.retrained_parameters().values()} == {torch.float32}
    del module._base_fingerprint
    assert module.base_fingerprint == before


# -- captions --------------------------------------------------------------------------------------------------------


def test_dropped_captions_are_zero_embedding_and_zero_mask(make_batch):
    batch = make_batch([3, 2, 5])
    got = batch.without_captions([True, False, True])
    assert got.text_lengths == (0, 2, 0)
    assert not got.text[[0, 2]].any() and torch.equal(got.text[1], batch.text[1])
    assert not got.text_mask[[0, 2]].any() and torch.equal(got.text_mask[1], batch.text_mask[1])
    assert torch.equal(got.latents, batch.latents) and (got.uids, got.keys) == (batch.uids, batch.keys)
    assert batch.without_captions([False] * 3) is batch
    assert batch.text_lengths == (3, 2, 5) and batch.text[0].any()


def test_a_dropped_caption_leaves_no_trace(make_module, make_batch):
    module = make_module()
    one, two = make_batch([4, 3], seed=1), make_batch([4, 3], seed=2)
    two.latents = one.latents
    drop = [True, True]
    assert torch.equal(loss_of(module, one.without_captions(drop)), loss_of(module, two.without_captions(drop)))
    assert not torch.equal(loss_of(module, one), loss_of(module, two))


# -- building -----------------------------------------------------------------------------------------------------


def test_faults_before_anything_is_loaded(make_module, tmp_path):
    module = make_module(build=False, blocks=(3,))
    with pytest.raises(ValueError, match=r"out of range: \[3\]"):
        module.check()
    with pytest.raises(ValueError, match="does not exist"):
        make_module(build=False, base=tmp_path / "no").check()
    good = make_module(build=False)
    good.check()
    good.check_data((4, 2, 4, 6), 16)
    with pytest.raises(ValueError, match=r"takes \(4, F, H, W\)"):
        good.check_data((12, 2, 4, 6), 16)
    with pytest.raises(ValueError, match="captions 32 wide"):
        good.check_data((4, 2, 4, 6), 32)


def test_meta_device_builds_shapes(make_module, base_folder: Path):
    module = make_module(build=False)
    module.build("meta")
    assert {p.device.type for p in module.split_model.transformer.parameters()} == {"meta"}
    assert module.retrained_parameters().keys() == make_module().retrained_parameters().keys()
