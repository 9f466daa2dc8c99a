"""A training step on a CUDA device: bf16 trunk, fused AdamW, autocast close to float32, no wait for the device."""

import copy

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig
from trainer.step_figures import StepFigures

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none"),
]


@pytest.fixture
def make_module(base_folder):
    def make(*, build=True, **options):
        module = RetrainBlocks(
            base=str(base_folder), surgery=SurgeryConfig(blocks=[1, 2], init="torch"),
            optim=OptimConfig(lr=3e-3, warmup_steps=1), caption_dropout=0.0, **options,
        )  # fmt: skip
        if build:
            module.build("cuda")
            module.to("cuda")
        return module

    return make


def step(module, batch, autocast=False):
    """Loss and gradients of one batch with the module's own noise and sigma."""
    module.zero_grad(set_to_none=True)
    flow, device = module.flow, batch.latents.device
    noise = flow.noise(0, batch.uids, batch.latents.shape[1:]).to(device)
    sigma = flow.sigma(0, batch.uids).to(device)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = module.losses(batch, noise, sigma).mean()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in module.retrained_parameters().values()])


def test_same_as_on_the_cpu(make_module, make_batch):
    module, batch = make_module(), make_batch()
    torch.backends.cuda.matmul.allow_tf32 = False
    loss, grads = step(module, batch.to("cuda"))
    want_loss, want = step(copy.deepcopy(module).to("cpu"), batch)
    torch.testing.assert_close(loss.cpu(), want_loss, rtol=1e-4, atol=0)
    assert (grads.cpu() - want).norm() < 1e-3 * want.norm()


@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("checkpoint_head", [False, True])
def test_autocast_is_close_to_float32(make_module, make_batch, trunk_dtype, checkpoint_head):
    batch = make_batch().to("cuda")
    loss, grads = step(make_module(), batch)
    narrow_loss, narrow = step(
        make_module(trunk_dtype=trunk_dtype, checkpoint_head=checkpoint_head), batch, autocast=True
    )
    torch.testing.assert_close(narrow_loss, loss, rtol=0.03, atol=0)
    assert torch.nn.functional.cosine_similarity(narrow, grads, dim=0) > 0.99
    assert narrow.dtype == torch.float32


def test_fit_in_bf16_mixed_with_fused_adamw(make_module, make_batch, tmp_path):
    module = make_module(build=False, trunk_dtype="bfloat16", checkpoint_head=True)
    losses = []
    step_of = module.training_step
    module.training_step = lambda batch, batch_idx: (losses.append(step_of(batch, batch_idx)), losses[-1])[1]
    trainer = Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=25, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, DataLoader([make_batch()] * 25, batch_size=None))
    assert trainer.optimizers[0].defaults["fused"]
    assert float(losses[-1]) < 0.9 * float(losses[0]) and module.skipped == 0
    assert {p.dtype for p in module.retrained_parameters().values()} == {torch.float32}
    assert {a.device.type for a in module.ema.average.values()} == {"cuda"}


def test_forward_and_backward_never_wait_for_the_device(make_module, make_batch):
    module = make_module(trunk_dtype="bfloat16")
    batch = make_batch([3, 0, 5]).to("cuda")
    x, sigma = batch.latents, torch.full((3,), 0.5, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        module.velocity(x, sigma, batch).square().mean().backward()  # first use of kernels and libraries
        torch.cuda.set_sync_debug_mode("error")
        try:
            module.velocity(x, sigma, batch).square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_figures_of_a_step_never_wait_for_the_device():
    figures = StepFigures()
    losses, sigma = torch.rand(3, device="cuda"), torch.tensor([0.1, 0.2, 0.9])
    figures.add(losses, sigma, tokens=7, faults=1)
    figures.finish("cuda")  # first use of kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            figures.add(losses, sigma, tokens=7, faults=1)
        means, counts = figures.finish("cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (float(counts["samples"]), float(counts["tokens"]), float(counts["faults"])) == (6, 14, 2)
    assert float(means["train/loss"]) == pytest.approx(float(losses.mean()))
    assert float(means["train/loss_sigma_0.00-0.25"]) == pytest.approx(float(losses[:2].mean()))


def test_random_weights_are_made_on_the_device_by_seed(config_json):
    from trainer.models.load import load_transformer

    state = torch.cuda.get_rng_state()
    a, b = (load_transformer(str(config_json), device="cuda", dtype=torch.bfloat16, seed=3) for _ in range(2))
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert all(
        p.device.type == "cuda" and torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True)
    )
