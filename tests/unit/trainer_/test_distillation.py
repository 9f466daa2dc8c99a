"""Losses against the base's own blocks: zero for the base itself, equal to a hand loop, in the phases of a run."""

import pytest
import torch

from trainer.distillation import ObjectivePhase, check_phases, phase_at
from trainer.module import OptimConfig, SurgeryConfig

BLOCKS, VELOCITY, FLOW = ObjectivePhase(blocks=1.0), ObjectivePhase(velocity=1.0), ObjectivePhase(flow=1.0)
ALL = ObjectivePhase(flow=0.5, velocity=2.0, blocks=3.0)


def with_phase(make_module, phase, **how):
    module = make_module(objective=(phase,), **how)
    module.configure_model()
    return module


def drawn(make_batch, lengths=(3, 0, 5)):
    batch = make_batch(lengths)
    generator = torch.Generator().manual_seed(1)
    return batch, torch.randn(batch.latents.shape, generator=generator), torch.tensor([0.1, 0.5, 0.9])[: len(lengths)]


@pytest.mark.parametrize("blocks", [[1, 2], [0, 2], [2]])
@pytest.mark.parametrize("phase", [BLOCKS, VELOCITY])
@pytest.mark.parametrize("how", [{}, {"trunk_dtype": "bfloat16"}, {"checkpoint_head": True}], ids=str)
def test_the_base_itself_has_nothing_to_learn(make_module, make_batch, phase, blocks, how):
    surgery = SurgeryConfig(blocks=blocks, init="keep")
    module = with_phase(make_module, phase, surgery=surgery, **how)
    narrow = "trunk_dtype" in how
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        losses = module.objective_losses(*drawn(make_batch), phase)
    # Autocast rounds the student's matrices as the teacher's are rounded, but not its norms.
    assert losses.dtype == torch.float32 and (losses <= (1e-4 if narrow else 0.0)).all(), losses
    fresh = with_phase(make_module, phase, surgery=SurgeryConfig(blocks=blocks, init="normal"))
    assert (fresh.objective_losses(*drawn(make_batch), phase) > 1e-3).all()


def by_hand(model, base, layers, batch, noise, sigma, phase):
    """The losses of a phase in a loop over samples, with diffusers' own attention and float64 sums."""
    total = torch.zeros(len(batch), dtype=torch.float64)
    for i, length in enumerate(batch.text_lengths):
        level = sigma[i]
        x = ((1 - level) * batch.latents[i] + level * noise[i])[None]
        mask = batch.text_mask[i : i + 1].float()
        temb, text = model.time_embed(1000 * (1 - level[None]), batch.text[i : i + 1], mask, hidden_dtype=x.dtype)
        _, _, frames, height, width = x.shape
        vision = model.patch_embed(x.permute(0, 2, 1, 3, 4).flatten(0, 1)).flatten(0, 1)[None]
        rope = model.rope(model.pos_frequencies, frames, height // 2, width // 2, dtype=torch.float32)

        def run(block, vision, text, temb=temb, mask=mask, rope=rope):
            return block(vision, text, temb, mask, rope)

        for layer in range(layers[0]):
            vision, text = run(model.transformer_blocks[layer], vision, text)
        student, teacher, shares = (vision, text), (vision, text), []
        for layer in range(layers[0], len(model.transformer_blocks)):
            before, teacher = teacher, run(base.transformer_blocks[layer], *teacher)
            student = run(model.transformer_blocks[layer], *student)
            if layer in layers:
                alone = run(model.transformer_blocks[layer], *before)
                streams = [slice(None), slice(length)][: 1 if layer == len(model.transformer_blocks) - 1 else 2]
                streams = streams[: 2 if length else 1]
                streams = [
                    (alone[kind][0, part] - teacher[kind][0, part]).double().square().sum()
                    / (before[kind][0, part] - teacher[kind][0, part]).double().square().sum()
                    for kind, part in enumerate(streams)
                ]  # fmt: skip
                shares.append(sum(streams) / len(streams))

        def velocity(vision, temb=temb, size=(frames, height // 2, width // 2)):
            out = model.proj_out(model.norm_out(vision, temb)).reshape(*size, 2, 2, -1)
            return out.permute(5, 0, 1, 3, 2, 4).reshape(-1, size[0], size[1] * 2, size[2] * 2)

        found, taught = velocity(student[0]), velocity(teacher[0]).detach()
        total[i] = (
            phase.flow * (found - (batch.latents[i] - noise[i])).double().square().mean()
            + phase.velocity * (found - taught).double().square().mean()
            + phase.blocks * sum(shares) / len(shares)
        )
    return total


@pytest.mark.parametrize("layers", [(1, 2), (0, 2)])
@pytest.mark.parametrize("phase", [BLOCKS, VELOCITY, FLOW, ALL], ids=["blocks", "velocity", "flow", "all"])
def test_losses_and_gradients_are_those_of_a_loop_by_hand(make_module, make_batch, make_transformer, phase, layers):
    module = with_phase(make_module, phase, surgery=SurgeryConfig(blocks=list(layers), init="normal"))
    batch, noise, sigma = drawn(make_batch)
    losses = module.objective_losses(batch, noise, sigma, phase)
    losses.sum().backward()
    found = {name: p.grad for name, p in module.retrained_parameters().items()}

    base = with_phase(make_module, phase, surgery=SurgeryConfig(blocks=list(layers), init="keep"))
    hand = with_phase(
        make_module, phase, surgery=SurgeryConfig(blocks=list(layers), init="normal"), stock_attention=True
    )
    base.split_model.transformer.requires_grad_(False)
    want = by_hand(hand.split_model.transformer, base.split_model.transformer, layers, batch, noise, sigma, phase)
    torch.testing.assert_close(losses.double(), want, rtol=1e-4, atol=1e-6)
    want.sum().backward()
    for name, p in hand.retrained_parameters().items():
        got = found[name]
        assert (got is None) == (p.grad is None), name
        if got is not None:
            torch.testing.assert_close(got, p.grad, rtol=2e-3, atol=2e-5 * float(p.grad.abs().max() + 1e-3), msg=name)


def test_padding_and_other_samples_do_not_change_a_loss(make_module, make_batch):
    module = with_phase(make_module, BLOCKS, surgery=SurgeryConfig(last=2, init="normal"))
    batch, noise, sigma = drawn(make_batch)
    together = module.objective_losses(batch, noise, sigma, BLOCKS)
    padded = make_batch((3, 0, 5), pad=4)
    torch.testing.assert_close(module.objective_losses(padded, noise, sigma, BLOCKS), together, rtol=1e-4, atol=1e-6)
    alone = make_batch((3,))
    alone.latents, alone.text, alone.text_mask = batch.latents[:1], batch.text[:1], batch.text_mask[:1]
    one = module.objective_losses(alone, noise[:1], sigma[:1], BLOCKS)
    torch.testing.assert_close(one, together[:1], rtol=1e-4, atol=1e-6)


def test_the_teacher_is_frozen_unsaved_and_in_the_trunks_dtype(make_module):
    module = with_phase(make_module, VELOCITY, trunk_dtype="bfloat16", surgery=SurgeryConfig(last=2))
    assert {p.dtype for p in module.teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in module.teacher.parameters())
    checkpoint = {}
    module.on_save_checkpoint(checkpoint)
    assert not any("teacher" in name for name in checkpoint["state_dict"])
    assert with_phase(make_module, FLOW).teacher is None


@pytest.mark.parametrize(
    "phases, fault",
    [
        ([], "phases of \\[\\] steps"),
        ([ObjectivePhase(flow=1, steps=5)], "null in the last"),
        ([ObjectivePhase(flow=1), ObjectivePhase(blocks=1)], "phases of \\[None, None\\] steps"),
        ([ObjectivePhase(flow=1, steps=0), FLOW], "1 or more"),
        ([ObjectivePhase()], "one above"),
        ([ObjectivePhase(flow=-1, blocks=2)], "all at least 0"),
        ([ObjectivePhase(flow=float("nan"))], "all at least 0"),
        ([ObjectivePhase(flow=float("inf"))], "all at least 0"),
    ],
)
def test_phases_that_cannot_be_are_refused(phases, fault):
    with pytest.raises(ValueError, match=fault):
        check_phases(phases)


def test_a_teacher_needs_a_trunk_that_stays(make_module):
    with pytest.raises(ValueError, match=r"in phase 1 with surgery.train_outside, expected flow alone"):
        make_module(
            objective=(ObjectivePhase(flow=1, steps=5), ObjectivePhase(flow=1, blocks=1)),
            surgery=SurgeryConfig(last=2, train_outside=True),
        )


def test_an_empty_list_of_phases_is_not_the_default(make_module):
    assert make_module(objective=None).phases == (FLOW,)
    with pytest.raises(ValueError, match="phases of \\[\\] steps"):
        make_module(objective=())


def test_a_teacher_needs_a_frozen_trunk(make_module):
    with pytest.raises(ValueError, match="train_outside"):
        make_module(objective=(BLOCKS,), surgery=SurgeryConfig(last=1, train_outside=True))


def test_phases_follow_each_other_by_their_steps():
    phases = [ObjectivePhase(blocks=1, steps=3), ObjectivePhase(velocity=1, steps=2), FLOW]
    assert [phases.index(phase_at(phases, step)) for step in range(8)] == [0, 0, 0, 1, 1, 2, 2, 2]


def test_a_fit_takes_the_losses_of_its_phases(make_module, make_batch, fit, make_recorder):
    """Two steps of `blocks`, then three of `flow`, which start from the weights that the first two left."""
    phases = [ObjectivePhase(blocks=1, steps=2), FLOW]
    optim, batch = OptimConfig(lr=1e-3, warmup_steps=1), make_batch()
    mixed, alone = make_recorder(), make_recorder()
    fit(make_module(objective=phases, optim=optim), [batch] * 5, callbacks=[mixed])
    fit(make_module(objective=(BLOCKS,), optim=optim), [batch] * 5, callbacks=[alone])
    losses = [[m["train/loss"] for m in recorder.metrics] for recorder in (mixed, alone)]
    assert losses[0][:2] == losses[1][:2] and all(
        a != b for a, b in zip(*losses, strict=True) if a not in losses[1][:2]
    )
    for name, want in alone.weights[1].items():
        assert torch.equal(mixed.weights[1][name], want), name
    assert any(not torch.equal(mixed.weights[2][name], want) for name, want in alone.weights[2].items())
