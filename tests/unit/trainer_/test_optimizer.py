"""AdamW's groups, the learning rate over a fit, and clipping."""

import math

import pytest
import torch
from lightning.pytorch import Callback

from trainer.module import OptimConfig

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:In CPU autocast")


def test_decay_spares_norms_and_biases(make_module):
    module = make_module(optim=OptimConfig(weight_decay=0.3, lr=2e-3, betas=(0.8, 0.9), eps=1e-7))
    optimizer = module.configure_optimizers()["optimizer"]
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    named = module.retrained_parameters()
    assert decay.keys() == {id(p) for p in named.values()}
    for name, p in named.items():
        plain = name.endswith("bias") or ".norm_" in name
        assert decay[id(p)] == (0.0 if plain else 0.3), name
    assert all(g["betas"] == (0.8, 0.9) and g["eps"] == 1e-7 for g in optimizer.param_groups)


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
def test_rate_rises_linearly_and_then_stays(make_module, make_batch, fit, warmup, make_recorder):
    recorder = make_recorder()
    module = make_module(optim=OptimConfig(lr=1e-3, warmup_steps=warmup))
    fit(module, [make_batch([1])] * 9, callbacks=[recorder])
    got = [m["train/lr"] for m in recorder.metrics]
    want = [1e-3 * min(1.0, (n + 1) / max(1, warmup)) for n in range(9)]
    assert got == pytest.approx(want, rel=1e-6)


def test_rate_falls_linearly_over_the_last_share_of_the_run(make_module, make_batch, fit, make_recorder):
    recorder = make_recorder()
    module = make_module(optim=OptimConfig(lr=1e-3, warmup_steps=2, decay_steps=4))
    fit(module, [make_batch([1])] * 10, callbacks=[recorder])
    got = [m["train/lr"] for m in recorder.metrics]
    assert got == pytest.approx([0.5e-3, *[1e-3] * 6, 0.75e-3, 0.5e-3, 0.25e-3], rel=1e-6)


def test_a_rate_that_decays_needs_an_end(make_module, make_batch, fit):
    with pytest.raises(ValueError, match="decay_steps 3 in a run without end"):
        fit(make_module(optim=OptimConfig(decay_steps=3)), [make_batch()], max_epochs=-1, max_steps=-1)
    with pytest.raises(ValueError, match="decay_steps -1"):
        OptimConfig(decay_steps=-1)


@pytest.mark.parametrize("clip", [0.0, 1e-3, 1e6])
def test_clipping_scales_to_the_norm(make_module, make_batch, fit, clip, make_recorder):
    """Also with Trainer(gradient_clip_val=None), the default here: the hook is the module's own."""
    module, seen = make_module(optim=OptimConfig(clip_norm=clip, warmup_steps=1)), []

    class Norms(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            grads = [p.grad for p in module.retrained_parameters().values() if p.grad is not None]
            if grads:
                seen.append(float(torch.nn.utils.get_total_norm(grads)))

    recorder = make_recorder()
    fit(module, [make_batch()] * 2, callbacks=[Norms(), recorder])
    logged = recorder.metrics[0]["train/grad_norm"]
    assert logged > 0.01, "the norm that is logged is the one before clipping"
    assert seen[0] == pytest.approx(min(clip or math.inf, logged), rel=1e-3)
