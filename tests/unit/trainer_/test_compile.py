"""Compiled blocks: the same steps, measured as they are without."""

import functools

import pytest
import torch
import torch._dynamo
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from tests.support.tiny_families import inputs, make
from trainer.compile import compile_blocks
from trainer.distillation import ObjectivePhase
from trainer.models.families import split_model_of
from trainer.models.layout import dense_attention


@pytest.fixture
def ran(monkeypatch):
    """Graphs that compiled blocks ran, one entry each time; they run as eager code does, so that results are equal."""
    seen = []

    def backend(graph, inputs):
        def run(*args):
            seen.append(graph)
            return graph.forward(*args)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    yield seen
    torch._dynamo.reset()


def losses(module, batch):
    noise = module.flow.noise(0, batch.uids, batch.latents.shape[1:])
    return module.losses(batch, noise, module.flow.sigma(0, batch.uids))


@pytest.mark.parametrize("part, blocks", [("none", 0), ("trunk", 1), ("head", 2), ("both", 3)])
def test_training_runs_compiled_the_blocks_that_were_asked_for(make_module, make_batch, ran, part, blocks):
    batch, eager, module = make_batch((4, 4)), make_module(), make_module(compile=part)
    want, got = losses(eager, batch), losses(module, batch)
    assert len(ran) == blocks
    assert torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    for name, p in eager.retrained_parameters().items():
        assert torch.equal(module.retrained_parameters()[name].grad, p.grad), name


@pytest.mark.parametrize("part, blocks", [("none", 0), ("trunk", 3), ("head", 4), ("both", 7)])
def test_the_teacher_is_compiled_with_the_trunk(make_module, make_batch, ran, part, blocks):
    """A step runs one block of the trunk, two of the teacher, two of the head in a row, and two each alone."""
    phase = ObjectivePhase(blocks=1.0, velocity=0.5)
    batch, eager, module = make_batch((4, 4)), make_module(objective=(phase,)), make_module(
        objective=(phase,), compile=part)  # fmt: skip
    noise, sigma = eager.flow.noise(0, batch.uids, batch.latents.shape[1:]), eager.flow.sigma(0, batch.uids)
    want, got = (each.objective_losses(batch, noise, sigma, phase) for each in (eager, module))
    assert len(ran) == blocks
    assert torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    for name, p in eager.retrained_parameters().items():
        assert torch.equal(module.retrained_parameters()[name].grad, p.grad), name


def test_names_do_not_change(make_module, ran):
    eager, module = make_module(), make_module(compile="both")
    assert list(module.state_dict()) == list(eager.state_dict())
    assert list(module.retrained_parameters()) == list(eager.retrained_parameters())
    assert module.base_fingerprint == eager.base_fingerprint


def test_whatever_is_measured_runs_eagerly(make_module, make_batch, ran):
    batch, eager, module = make_batch((4, 4)), make_module(), make_module(compile="both")
    calls = []

    def observed(q, k, v, call):
        calls.append(call.layer)
        return dense_attention(q, k, v, call)

    with torch.no_grad(), module.split_model.attention(dict.fromkeys(range(3), observed)):
        got = losses(module, batch)  # also while the module trains
    module.eval()
    with torch.no_grad():
        assert torch.equal(losses(module, batch), losses(eager.eval(), batch))
    assert calls == [0, 1, 2] and ran == []
    assert torch.equal(got, losses(eager, batch))
    module.train()
    losses(module, batch)
    assert len(ran) == 3


def test_blocks_share_what_is_compiled(make_transformer, make_module, make_batch, ran, tmp_path):
    """Deeper models compile no more: one graph each for trunk, head and last block."""
    make_transformer(seed=7, num_layers=6).save_pretrained(tmp_path / "transformer")
    module = make_module(base=tmp_path, blocks=(3, 4, 5), compile="both")
    losses(module, make_batch((4, 4)))
    assert len(ran) == 6 and len({id(graph) for graph in ran}) <= 4


def test_blocks_of_two_attention_sites_share_a_graph_and_run_eagerly_where_either_is_observed(ran):
    model, calls = make("wan").train(), []
    split_model, args = split_model_of(model), inputs(model, (3, 3))

    def observed(q, k, v, call):
        calls.append((call.site, call.layer))
        return dense_attention(q, k, v, call)

    want = split_model(**args)
    compile_blocks(split_model.blocks, 2, "both")
    assert torch.equal(split_model(**args), want)
    assert len(ran) == 4 and len({id(graph) for graph in ran}) == 1
    for site in split_model.attention_sites:
        with split_model.attention({1: observed}, site=site):
            assert torch.equal(split_model(**args), want)
    assert calls == [("self", 1), ("cross", 1)] and len(ran) == 4 + 3 + 3


def test_stock_attention_is_not_compiled(make_module):
    with pytest.raises(ValueError, match="got compile 'both' with stock_attention"):
        make_module(build=False, compile="both", stock_attention=True)


class Losses(Callback):
    """Keeps each step's loss, and saves before the last one: at a fit's end the number of the epoch has moved on."""

    def __init__(self, path):
        self.path, self.steps = path, []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.steps.append(float(outputs["loss"]))
        if trainer.global_step == 2 and not self.path.exists():
            trainer.save_checkpoint(self.path)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_real_compiler_trains_as_eager_code_and_resumes_bit_for_bit(make_module, make_batch, tmp_path):
    batches = [make_batch((4, 4))] * 4  # the same one: a plain loader starts over when a run goes on

    def fit(name, resume=None, **options):
        torch._dynamo.reset()  # a resumed run is a new process, which compiles anew
        seen, module = Losses(tmp_path / name), make_module(ema_decay=0.9, caption_dropout=0.0, **options)
        trainer = Trainer(
            accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path, max_steps=4, callbacks=[seen],
        )  # fmt: skip
        trainer.fit(module, DataLoader(batches, batch_size=None), ckpt_path=resume, weights_only=True)
        return seen.steps, module.retrained_parameters()

    eager, _ = fit("eager")
    whole, weights = fit("whole", compile="both")
    rest, resumed = fit("resumed", resume=tmp_path / "whole", compile="both")
    # Fused kernels round in other places than single ones: float32's 6e-8, a few times over in three blocks.
    torch.testing.assert_close(whole, eager, rtol=2e-6, atol=0)
    assert rest == whole[2:] and len(set(whole)) == 4
    assert all(torch.equal(resumed[name], p) for name, p in weights.items())
