"""What noise does to a latent, and what is predicted of it: closed forms, and each family's own pipeline."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.models.modeling_utils import ModelMixin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.tiny_families import make
from trainer.models.families import split_model_of
from trainer.models.process import DiscreteVelocity, RectifiedFlow

#: What diffusers' conversion script writes into scheduler_config.json, apart from `snr_shift_scale`.
COGVIDEOX = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
}  # fmt: skip
#: A family and a sampler -> diffusers' scheduler.
SAMPLERS = {
    "wan unipc": lambda: UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "wan euler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "hunyuan euler": lambda: FlowMatchEulerDiscreteScheduler(shift=7.0),
    "cogvideox-2b ddim": lambda: CogVideoXDDIMScheduler(snr_shift_scale=3.0, **COGVIDEOX),
    "cogvideox-2b dpm": lambda: CogVideoXDPMScheduler(snr_shift_scale=3.0, **COGVIDEOX),
    "cogvideox-5b ddim": lambda: CogVideoXDDIMScheduler(snr_shift_scale=1.0, **COGVIDEOX),
    "cogvideox-5b dpm": lambda: CogVideoXDPMScheduler(snr_shift_scale=1.0, **COGVIDEOX),
}
PIPELINES = {
    "wan": WanPipeline, "hunyuan": HunyuanVideoPipeline, "cogvideox-2b": CogVideoXPipeline,
    "cogvideox-5b": CogVideoXPipeline,
}  # fmt: skip
STEPS = 5  # CogVideoX's samplers are right only for a divisor of 1000 (docs/models.md)


def process_of(name):
    return split_model_of(make(name)).process


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sigma_of(process, timestep):
    """A sigma that has this timestep, by bisection: a closed form would repeat the code under test."""

    def told(sigma):
        return float(process.timestep(torch.tensor([sigma], dtype=torch.float64)))

    low, high = (0.0, 1.0) if told(1.0) > told(0.0) else (1.0, 0.0)
    assert told(low) <= timestep <= told(high), f"no sigma has the timestep {timestep}"  # it is monotone
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if told(middle) >= timestep else (middle, high)
    return high


class ExactModel(ModelMixin):
    """Knows the latent that it should arrive at; solves x for the noise, and returns the family's target."""

    def __init__(self, name, latent, dtype):
        super().__init__()
        tiny = make(name)
        self.tiny_config, self.process, self.latent = tiny.config, split_model_of(tiny).process, latent
        self.anchor = nn.Parameter(torch.zeros((), dtype=dtype))  # the pipelines ask for the model's dtype
        self.steps = {}

    @property
    def config(self):
        return self.tiny_config

    def cache_context(self, name, **kwargs):
        return torch.no_grad()

    def forward(self, hidden_states, timestep, **kwargs):
        (told,) = set(timestep.tolist())
        assert hidden_states.dtype == self.dtype and len(timestep) == len(hidden_states)
        x, sigma = hidden_states.double(), torch.full((len(hidden_states),), sigma_of(self.process, told)).double()
        latent, zeros = self.latent.expand(x.shape), torch.zeros_like(x)
        spread = self.process.mix(zeros, zeros + 1, sigma)  # x is affine in the noise
        noise = (x - self.process.mix(latent, zeros, sigma)) / spread
        self.steps[told] = SimpleNamespace(x=x[:1], noise=noise[:1], spread=spread[:1], sigma=float(sigma[0]))
        return (self.process.target(latent, noise, sigma).to(self.dtype),)


def run(name, scheduler, model):
    """The latent at which the family's pipeline arrives, at 16 x 32 pixels."""
    text = torch.zeros(1, 5, 16, dtype=model.dtype)
    how = {"negative_prompt_embeds": text, "guidance_scale": 5.0}
    parts = {"text_encoder": None, "tokenizer": None, "vae": None}
    if name == "hunyuan":  # its guidance is embedded
        how = {"pooled_prompt_embeds": torch.zeros(1, 8), "prompt_attention_mask": torch.ones(1, 5)}
        parts |= {"text_encoder_2": None, "tokenizer_2": None}
    pipeline = PIPELINES[name](transformer=model, scheduler=scheduler, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=text, height=16, width=32, num_frames=5, num_inference_steps=STEPS, output_type="latent",
        generator=torch.Generator().manual_seed(1), **how,
    ).frames  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_exact_target_drives_the_pipeline_to_the_latent(sampler, dtype):
    name, scheduler = sampler.split()[0], SAMPLERS[sampler]()
    shape = (1, 2, 4, 2, 4) if name.startswith("cogvideox") else (1, 4, 2, 2, 4)  # CogVideoX: frames before channels
    latent = draw(*shape, dtype=torch.float64)
    model = ExactModel(name, latent, dtype)
    got = run(name, scheduler, model).double()

    def tolerance(told):
        """Error of the z that the sampler makes of x and the prediction p in one step.

        Every sampler computes z as a x + b p. Numbers are rounded at five places, by a relative half of eps each: the
        x that the model sees, p, b p, the timestep where the pipeline casts it to the model's dtype (HunyuanVideo), and
        the result. The first is at most |x|, the last |z|, and |b p| at most |x| + |z|. So the sum is below
        4 (|x| + |z|) half eps.
        """
        x = model.steps[told].x
        error = 4 * torch.finfo(dtype).eps / 2 * (x.abs() + latent.abs())
        if sampler == "wan unipc":
            # It tells the model floor(1000 s), and steps with s (docs/models.md): b p, or x - z, is too large by a part
            # in `told`, at most.
            error += (x - latent).abs() / told
        return error

    # Each sampler ends at the z of its last step.
    last = list(model.steps)[-1]
    assert got.shape == latent.shape and ((got - latent).abs() <= tolerance(last)).all()

    assert len(model.steps) == STEPS
    sigmas = [step.sigma for step in model.steps.values()]
    assert sigmas[0] > 0.998 and sigmas == sorted(sigmas, reverse=True), "from pure noise to the data"
    if dtype == torch.float32 and not sampler.endswith("dpm"):  # which draws new noise at each step
        # No step leaves the path between the latent and the noise of the start.
        start, moved = next(iter(model.steps.values())).noise, torch.zeros_like(latent)
        for told, step in model.steps.items():
            moved += tolerance(told)
            assert ((step.noise - start).abs() <= moved / step.spread).all(), told


BATCH = (3, 2, 4, 2, 2)  # B, then the axes of a latent


@pytest.mark.parametrize(("name", "towards_data"), [("mochi", True), ("wan", False), ("hunyuan", False)], ids=str)
def test_rectified_flow(name, towards_data):
    process, z, noise = process_of(name), draw(*BATCH), draw(*BATCH, seed=1)
    sigma = torch.tensor([0.0, 1.0, 0.25])
    assert isinstance(process, RectifiedFlow)
    x = process.mix(z, noise, sigma)
    assert torch.equal(x[0], z[0]) and torch.equal(x[1], noise[1])
    torch.testing.assert_close(x[2], 0.75 * z[2] + 0.25 * noise[2])
    sign = 1 if towards_data else -1
    assert torch.equal(process.target(z, noise, sigma), sign * (z - noise))
    # A straight path: from any sigma, the target leads to the data.
    back = x + sign * sigma.view(-1, 1, 1, 1, 1) * process.target(z, noise, sigma)
    torch.testing.assert_close(back, z, rtol=0, atol=1e-6)
    want = [1000.0, 0.0, 750.0] if towards_data else [0.0, 1000.0, 250.0]
    assert process.timestep(sigma).tolist() == want


@pytest.mark.parametrize("name", ["mochi", "wan", "hunyuan", "cogvideox-2b", "cogvideox-5b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_timesteps_are_float32(name, dtype):
    process, sigma = process_of(name), torch.tensor([0.0, 0.5, 0.9985], dtype=dtype)
    told = process.timestep(sigma)
    assert told.dtype == torch.float32 and told.shape == (3,)
    if dtype != torch.bfloat16:  # which has no sigma between 0.996 and 1, and no timestep between 996 and 1000
        exact = {"mochi": 1.5, "wan": 998.5, "hunyuan": 998.5, "cogvideox-2b": 998.0, "cogvideox-5b": 998.0}[name]
        assert told.tolist()[2] == pytest.approx(exact, abs=1e-4)


#: By size: the published shift, and the a of levels 0, 500 and 999 that docs/models.md has.
SCHEDULES = {"cogvideox-2b": (3.0, [0.9975, 0.0953, 0.0]), "cogvideox-5b": (1.0, [0.99915, 0.2410, 0.0])}
DISCRETE = DiscreteVelocity(3.0)
LEVELS = torch.arange(1000)
INSIDE = (LEVELS + 0.5) / 1000  # a sigma inside of each level


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_signal_has_its_closed_form(name):
    process, (shift, known) = process_of(name), SCHEDULES[name]
    assert isinstance(process, DiscreteVelocity)
    a = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    root = np.sqrt(a / (shift + (1 - shift) * a))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    zeros, ones = torch.zeros(1000, 1), torch.ones(1000, 1)
    # float32 rounds a, and thereby sqrt(1 - a), whose slope is 18 at the first level.
    for got, want in (
        (process.mix(ones, zeros, INSIDE), root),
        (process.mix(zeros, ones, INSIDE), np.sqrt(1 - root**2)),
    ):
        torch.testing.assert_close(got[:, 0].double(), torch.from_numpy(want), rtol=0, atol=2e-6)
    assert [process.signal[level] for level in (0, 500, 999)] == pytest.approx(known, abs=5e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_and_velocity_are_those_of_diffusers_scheduler(name):
    process, z, noise = process_of(name), draw(1000, 2, 3, 1, 1), draw(1000, 2, 3, 1, 1, seed=1)
    scheduler = SAMPLERS[f"{name} ddim"]()
    # The same float32 arithmetic, so a few roundings of numbers below 6.
    near = {"rtol": 0, "atol": 2e-6}
    torch.testing.assert_close(process.mix(z, noise, INSIDE), scheduler.add_noise(z, noise, LEVELS), **near)
    torch.testing.assert_close(process.target(z, noise, INSIDE), scheduler.get_velocity(z, noise, LEVELS), **near)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_level_has_some_noise_and_the_last_nothing_else(name):
    process, z, noise = process_of(name), draw(*BATCH), draw(*BATCH, seed=1)
    first, last = torch.zeros(3), torch.ones(3)
    a = SCHEDULES[name][1][0]
    # Four digits of a leave 5e-4 of sqrt(1 - a), times noise below 4.
    torch.testing.assert_close(process.mix(z, noise, first), a**0.5 * z + (1 - a) ** 0.5 * noise, rtol=0, atol=2e-3)
    assert torch.equal(process.mix(z, noise, last), noise)
    assert torch.equal(process.target(z, noise, last), -z)
    assert process.timestep(last).tolist() == [999.0] * 3 and process.timestep(first).tolist() == [0.0] * 3


@settings(max_examples=200, deadline=None)
@given(level=st.integers(0, 999), place=st.floats(0.001, 0.999))
def test_sigma_stands_for_the_level_that_it_lies_in(level, place):
    # Closer to the edge, float32 rounds 1000 sigma by up to 6e-5.
    sigma = torch.tensor([(level + place) / 1000], dtype=torch.float64)
    assert DISCRETE.timestep(sigma).tolist() == [level] and DISCRETE.timestep(sigma.float()).tolist() == [level]


@settings(max_examples=200, deadline=None)
@given(sigmas=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=8))
def test_every_sigma_has_a_level(sigmas):
    sigma = torch.tensor(sorted(sigmas))
    told = DISCRETE.timestep(sigma)
    assert torch.equal(told, told.round()) and told.min() >= 0 and told.max() <= 999
    assert (told.diff() >= 0).all()
    assert ((told + 0.5 - 1000 * sigma.double()).abs() <= 0.5 + 1e-4).all()
    # What x is and what the model is told belong to one level.
    z, noise = draw(len(sigma), 4), draw(len(sigma), 4, seed=1)
    assert torch.equal(DISCRETE.mix(z, noise, sigma), DISCRETE.mix(z, noise, (told + 0.5) / 1000))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_authors_weighted_loss_is_the_plain_loss_of_the_velocity(name):
    process = process_of(name)
    z, noise, guess = (draw(1000, 16, seed=seed, dtype=torch.float64) for seed in range(3))
    a = SAMPLERS[f"{name} ddim"]().alphas_cumprod.double()[:, None]
    data = a.sqrt() * process.mix(z, noise, INSIDE) - (1 - a).sqrt() * guess
    weighted = ((data - z) ** 2 / (1 - a)).mean(dim=1)
    plain = ((guess - process.target(z, noise, INSIDE)) ** 2).mean(dim=1)
    # float32 tables leave about 1e-7 of z in data - z, which 1 / sqrt(1 - a) makes up to 35 times as large.
    torch.testing.assert_close(weighted, plain, rtol=1e-4, atol=0)
