"""Operations of trunk and head against torch's counter over a real training step, and against the formula."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.plan import estimate
from tests.support.plans import CLIP, LATENT, SMALL, recipe
from trainer.module import RetrainBlocks, SurgeryConfig

TEXT = 32  # tokens: as long as captions may be


def counted_step(folder, make_batch, *, last, checkpoint_head):
    """Operations of one real step on a CPU, by stage; attention runs as plain matrix products, which torch counts."""
    module = RetrainBlocks(
        base=str(folder / "config.json"), surgery=SurgeryConfig(last=last, init="torch"),
        checkpoint_head=checkpoint_head,
    )  # fmt: skip
    module.build("cpu")
    batch = make_batch(
        [TEXT] * 2, grid=LATENT[1:], channels=SMALL["in_channels"], text_width=SMALL["text_embed_dim"]
    )  # fmt: skip
    noise, sigma = torch.randn_like(batch.latents), torch.full((2,), 0.5)
    target = module.process.target(batch.latents, noise, sigma)
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as counter:
            state = module.trunk(module.process.mix(batch.latents, noise, sigma), sigma, batch)
        found["trunk"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss = (module.head(state) - target).square().mean()
        found["head"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        found["backward"] = counter.get_total_flops()
    assert all(p.grad is not None for p in module.retrained_parameters().values())
    return found


@pytest.mark.parametrize("checkpoint_head", [False, True])
@pytest.mark.parametrize("last", [1, 2])
def test_operations_are_those_of_a_real_step(tmp_path, make_batch, last, checkpoint_head):
    model = {"surgery": {"last": last, "init": "torch"}, "checkpoint_head": checkpoint_head}
    planned = estimate([*recipe(tmp_path, model=model), *CLIP]).flops
    found = counted_step(tmp_path, make_batch, last=last, checkpoint_head=checkpoint_head)
    assert planned["trunk"] == found["trunk"] > 0
    assert planned["head"] == found["head"] > 0
    # The fused kernel that is planned for makes one product more in its backward pass: Q K^T again.
    tokens, width = 3 * 4 * 6 + TEXT, SMALL["num_attention_heads"] * SMALL["attention_head_dim"]
    assert planned["backward"] == found["backward"] + last * 2 * 2 * tokens**2 * width


def block_flops(vision, text, width, text_width, hidden, *, last=False):
    """One block's forward for one sample, as docs/plan.md has it."""
    inner = (2 * hidden) // 3
    text_inner = (2 * 4 * text_width) // 3
    per_vision = 4 * width * width + 3 * width * inner
    per_text = 3 * text_width * width + (0 if last else width * text_width + 3 * text_width * text_inner)
    modulation = 4 * width * width + width * (text_width if last else 4 * text_width)
    return 2 * (vision * per_vision + text * per_text + modulation) + 4 * (vision + text) ** 2 * width


def test_a_trunk_block_makes_what_the_formula_says(tmp_path):
    """Of two plans that differ by one trunk block only."""
    wide = SMALL | {"num_layers": 5}
    for name in ("four", "five"):
        (tmp_path / name).mkdir()
    four = estimate([*recipe(tmp_path / "four"), *CLIP]).flops
    five = estimate([*recipe(tmp_path / "five", config=wide), *CLIP]).flops
    assert four["head"] == five["head"] and four["backward"] == five["backward"]
    assert five["trunk"] - four["trunk"] == 2 * block_flops(72, TEXT, 128, 64, 4 * 128)


def test_micro_batches_multiply_operations(tmp_path):
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    one = estimate([*recipe(tmp_path / "one"), *CLIP])
    three = estimate([*recipe(tmp_path / "three", trainer={"accumulate_grad_batches": 3}), *CLIP])
    assert three.flops == {stage: 3 * flops for stage, flops in one.flops.items()}
    assert (one.work.accumulate, three.work.accumulate) == (1, 3)
    assert three.work.trunk == pytest.approx(3 * one.work.trunk) and three.work.update == one.work.update
    assert three.bytes_per_gpu > one.bytes_per_gpu  # gradients of the micro-batches before stay


def test_a_teacher_is_planned_for(tmp_path):
    """Its blocks run once forward, and lie in the trunk's dtype beside the model; the costliest phase counts."""

    def planned(name, *phases, **model):
        return estimate([*recipe(tmp_path / name, model={"objective": list(phases), **model}), *CLIP])

    for name in ("flow", "velocity", "blocks", "narrow"):
        (tmp_path / name).mkdir()
    flow = planned("flow", {"flow": 1.0})
    velocity = planned("velocity", {"flow": 1.0, "steps": 5}, {"velocity": 1.0})
    blocks = planned("blocks", {"blocks": 1.0, "steps": 5}, {"flow": 1.0})
    narrow = planned("narrow", {"velocity": 1.0}, trunk_dtype="bfloat16")
    assert velocity.flops == {**flow.flops, "head": 2 * flow.flops["head"]}
    assert blocks.flops["trunk"] == flow.flops["trunk"]
    assert 1.9 * flow.flops["head"] < blocks.flops["head"] < 2 * flow.flops["head"]  # the output layers do not run
    retrained = flow.parameters.retrained
    found = [plan.parts["teacher"] for plan in (flow, velocity, blocks, narrow)]
    assert found == [0, 4 * retrained, 4 * retrained, 2 * retrained]
