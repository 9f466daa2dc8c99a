"""The objective: samplers against their closed forms, keyed randomness, and the pipeline's own denoising loop."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trainer import objective
from trainer.models.process import RectifiedFlow
from trainer.objective import Flow, keyed_noise, keyed_uniform

DRAWS = 20_000
MOCHI = RectifiedFlow(towards_data=True)


def distance(draws, cdf) -> float:
    """Kolmogorov-Smirnov distance between draws and a distribution function."""
    ordered = np.sort(draws.double().numpy())
    want = cdf(ordered)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(want - steps[1:]).max(), np.abs(want - steps[:-1]).max())


def logit_normal(sigma):
    logit = np.log(sigma) - np.log1p(-sigma)
    return np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in logit])


def linear_quadratic(sigma):
    """A uniform place along the 64 steps: sigma falls along the schedule, so the share below it is 1 - place."""
    knots = np.array([*linear_quadratic_schedule(64, 0.025), 0.0])
    return 1 - np.interp(-sigma, -knots, np.arange(65) / 64)


CLOSED_FORMS = {"uniform": lambda sigma: sigma, "logit_normal": logit_normal, "linear_quadratic": linear_quadratic}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_sampler_has_its_distribution(name):
    draws = Flow(sigma=name, seed=1).sigma(0, range(DRAWS))
    assert draws.dtype == torch.float32 and draws.min() >= 0 and draws.max() <= 1
    critical = 1.63 / math.sqrt(DRAWS)  # 1 % level
    assert distance(draws, CLOSED_FORMS[name]) < critical
    others = [other for other in CLOSED_FORMS if other != name]
    assert all(distance(draws.clamp(1e-6, 1 - 1e-6), CLOSED_FORMS[other]) > 5 * critical for other in others)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
def test_a_shift_is_that_of_the_samplers(name, shift):
    plain = Flow(sigma=name).sigma(3, range(64)).sort(descending=True).values
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=plain.tolist())
    drawn = Flow(sigma=name, sigma_shift=shift).sigma(3, range(64)).sort(descending=True).values
    torch.testing.assert_close(drawn, scheduler.sigmas[:-1], rtol=1e-6, atol=0)  # it adds a 0 at the end
    assert torch.equal(drawn, plain) or shift > 1


def test_linear_quadratic_meets_the_pipeline_steps():
    sampler = Flow(sigma="linear_quadratic").sampler
    table = torch.tensor([*linear_quadratic_schedule(64, 0.025), 0.0])
    torch.testing.assert_close(sampler(torch.arange(65) / 64), table, rtol=0, atol=1e-6)
    between = (table[1:] + table[:-1]) / 2
    torch.testing.assert_close(sampler((torch.arange(64) + 0.5) / 64), between, rtol=0, atol=1e-6)
    # Half of all draws lie above 0.975, whatever the number of steps: why it is an option and not the default.
    assert (sampler(torch.linspace(0, 1, 10_001)) > 0.975).float().mean() == pytest.approx(0.5, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(
    uids=st.lists(st.integers(0, 2**40), min_size=1, max_size=6, unique=True),
    seed=st.integers(0, 2**33), epoch=st.integers(0, 1000), data=st.data(),
)  # fmt: skip
def test_noise_belongs_to_the_sample_not_to_the_batch(uids, seed, epoch, data):
    shuffled = data.draw(st.permutations(uids))[: data.draw(st.integers(1, len(uids)))]
    keyed = Flow(sigma="logit_normal", caption_dropout=0.5, seed=seed)
    noise, sigma, dropped = keyed.noise(epoch, uids, (2, 3)), keyed.sigma(epoch, uids), keyed.dropped(epoch, uids)
    at = [uids.index(uid) for uid in shuffled]
    assert torch.equal(keyed.noise(epoch, shuffled, (2, 3)), noise[at])
    assert torch.equal(keyed.sigma(epoch, shuffled), sigma[at])
    assert keyed.dropped(epoch, shuffled) == [dropped[i] for i in at]
    other = Flow(sigma="logit_normal", seed=seed + 1)
    assert not torch.equal(other.noise(epoch, uids, (2, 3)), noise)
    assert not torch.equal(keyed.noise(epoch + 1, uids, (2, 3)), noise)
    assert noise.dtype == torch.float32 and noise.shape == (len(uids), 2, 3)


def test_noise_is_standard_normal_and_every_sample_has_its_own():
    noise = keyed_noise(0, 0, range(500), (200,))
    assert abs(noise.mean()) < 0.015 and abs(noise.std() - 1) < 0.01
    assert (
        distance(noise.flatten()[:DRAWS], lambda x: np.array([0.5 * math.erfc(-v / math.sqrt(2)) for v in x])) < 0.012
    )
    correlation = torch.corrcoef(noise) - torch.eye(500)
    assert correlation.abs().max() < 0.5  # 200 numbers each: 7 standard deviations


def test_every_bit_of_the_key_counts(monkeypatch):
    """torch's CPU generator keeps 32 bits of its seed: among a million samples a hundred pairs would be twins."""
    seen = set()
    for byte in range(16):
        digest = bytes(1 if i == byte else 0 for i in range(16))
        monkeypatch.setattr(objective.hashlib, "blake2b", lambda *a, d=digest, **k: SimpleNamespace(digest=lambda: d))
        seen.add(tuple(keyed_noise(0, 0, [0], (4,))[0].tolist()))
    assert len(seen) == 16


def test_purposes_do_not_share_their_draws():
    sigma, caption = keyed_uniform("sigma", 0, 0, range(2000)), keyed_uniform("caption", 0, 0, range(2000))
    assert abs(torch.corrcoef(torch.stack([sigma, caption]))[0, 1]) < 0.1


def test_values_are_fixed_for_good():
    """Other values would break every run that is resumed with a newer version."""
    assert keyed_uniform("sigma", 0, 0, [0, 1]).tolist() == [0.022505640983581543, 0.6868521571159363]
    want = torch.tensor([-0.37313008308410645, 0.04728197306394577, 1.2175178527832031])
    torch.testing.assert_close(keyed_noise(0, 0, [0], (3,))[0], want, rtol=0, atol=1e-6)


def test_caption_dropout_has_its_share():
    assert np.mean(Flow(caption_dropout=0.1).dropped(0, range(20_000))) == pytest.approx(0.1, abs=0.007)
    assert not any(Flow(caption_dropout=0.0).dropped(0, range(1000)))
    assert all(Flow(caption_dropout=1.0).dropped(0, range(1000)))


def test_interpolation_and_target():
    z, eps = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    sigma = torch.tensor([0.0, 1.0, 0.25])
    x = MOCHI.mix(z, eps, sigma)
    assert torch.equal(x[0], z[0]) and torch.equal(x[1], eps[1])
    torch.testing.assert_close(x[2], 0.75 * z[2] + 0.25 * eps[2])
    # The target is minus the derivative of x with respect to sigma: integrating it down reaches the data.
    torch.testing.assert_close(x + sigma.view(-1, 1, 1, 1, 1) * MOCHI.target(z, eps, sigma), z)


def test_timestep_keeps_float32():
    sigma = torch.tensor([0.0, 1.0, 0.0015], dtype=torch.float32)
    got = MOCHI.timestep(sigma)
    assert got.dtype == torch.float32 and got.tolist() == pytest.approx([1000.0, 0.0, 998.5], abs=1e-4)
    assert MOCHI.timestep(sigma.bfloat16()).dtype == torch.float32


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match=re.escape("got sigma sampler 'cosine', expected one of ['linear_quadratic'")):
        Flow(sigma="cosine")
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="caption_dropout"):
            Flow(caption_dropout=share)
    for shift in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"got sigma_shift .*, expected a number above 0"):
            Flow(sigma_shift=shift)


class ExactVelocity(ModelMixin):
    """Knows the latent z that it should arrive at; solves x_sigma = (1 - sigma) z + sigma eps for eps."""

    def __init__(self, latent):
        super().__init__()
        self.latent = latent
        self.anchor = nn.Parameter(torch.zeros(()))
        self.seen = []

    @property
    def config(self):
        return SimpleNamespace(in_channels=12)

    def cache_context(self, name):
        return torch.no_grad()

    def forward(self, hidden_states, timestep, **kwargs):
        sigma = 1 - timestep.double() / 1000  # the inverse of MOCHI.timestep
        self.seen.append(sigma)
        x = hidden_states.double()
        sigma = sigma.view(-1, 1, 1, 1, 1)
        eps = (x - (1 - sigma) * self.latent) / sigma
        return (MOCHI.target(self.latent, eps, sigma).float(),)


@pytest.mark.parametrize("steps", [4, 64])
def test_exact_velocity_drives_the_pipeline_to_the_latent(steps):
    vae = AutoencoderKLMochi(
        encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5
    )
    # As the released pipeline's scheduler_config.json has it.
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, invert_sigmas=True)
    latent = torch.randn(1, 12, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = ExactVelocity(latent)
    pipeline = MochiPipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=model)
    pipeline.set_progress_bar_config(disable=True)
    text, mask = torch.zeros(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    got = pipeline(
        prompt_embeds=text, prompt_attention_mask=mask, negative_prompt_embeds=text,
        negative_prompt_attention_mask=mask, height=32, width=32, num_frames=7, num_inference_steps=steps,
        guidance_scale=4.5, output_type="latent", generator=torch.Generator().manual_seed(1),
    ).frames  # fmt: skip
    torch.testing.assert_close(got.double(), latent, rtol=0, atol=1e-4)
    sigmas = torch.stack([s[0] for s in model.seen])
    assert sigmas[0] == 1 and sigmas.diff().max() < 0, "the sampler starts at pure noise and goes down"
    torch.testing.assert_close(
        sigmas, torch.tensor(linear_quadratic_schedule(steps, 0.025), dtype=torch.float64), rtol=0, atol=1e-6
    )
