"""Sink frequency on whole tiny Mochi models whose sinks are known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.batch import Sample
from trainer.callbacks.intervals import wilson_interval
from trainer.callbacks.probe_set import ProbeSet
from trainer.callbacks.sinks import SinkFrequency
from trainer.models.from_scratch import reserve_channels
from trainer.models.planted_sinks import PlantedHead, plant_sinks
from trainer.module import RetrainBlocks, SurgeryConfig

GRID = (2, 4, 6)  # latent F, H, W: 2 x 2 x 3 tokens
SINK, OUTSIDE = PlantedHead(1, 1, 4.0), PlantedHead(0, 0, 4.0)
SIGMAS = (0.1, 0.3)


@pytest.fixture(scope="module")
def planted_base(tmp_path_factory, make_transformer):
    """A base with a sink in a retrained and one in a trunk block, and the direction that marks a token."""
    folder = tmp_path_factory.mktemp("planted")
    model = make_transformer(seed=3)
    with torch.no_grad():
        model.pos_frequencies[..., :2] = 0.0
        # The slice that stays free must be read as it is, and queries of planted heads along e1 in every block.
        reserve_channels(model, (0, 1))
        for block in model.transformer_blocks:
            block.attn1.norm_q.weight.fill_(1.0)
            block.attn1.norm_k.weight.fill_(1.0)
        plant_sinks(model, (0, 1), [SINK, OUTSIDE])
    model.save_pretrained(folder / "transformer")
    (folder / "planted.json").write_text(json.dumps({"heads": [{"layer": 1, "head": 1}, {"layer": 0, "head": 0}]}))
    return folder, model.patch_embed.proj.weight[1].detach().clone()


def marked_samples(direction, text_lengths=(3, 0, 3), strength=30.0):
    """Samples in which one patch, another in each, projects far more on the marker than any other."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, length in enumerate(text_lengths):
        latent = torch.randn(4, *GRID, generator=generator)
        frame, y, x = index % 2, 2 * (index % 2), 2 * (index % 3)
        latent[:, frame, y : y + 2, x : x + 2] += strength * direction
        samples.append(Sample(latent, torch.randn(length, 16, generator=generator), f"clip-{index}", index))
    return samples


def build(base, init="keep", last=2):
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(last=last, init=init))
    module.build("cpu")
    return module


@torch.no_grad()
def measure(module, samples, **kwargs):
    callback = SinkFrequency(**{"prompts": len(samples), "sigmas": SIGMAS} | kwargs)
    callback.check(module)
    probes = ProbeSet(samples, callback.sigmas, seed=1)
    tables = {}
    for batch, _ in probes.share(0, 1):
        for name, found in callback.observe(module, batch).items():
            table = tables.setdefault(name, np.zeros((len(samples), len(callback.sigmas), *found.shape[1:])))
            table[list(batch.prompts), list(batch.strata)] = found.double().numpy()
    return callback, callback.summarise(module, probes, tables)


def closed_form(module, sample, sigma, gain):
    """(alpha of the sink, its key) by the planted head's own formula, from the marker channel alone."""
    probes = ProbeSet([sample], (sigma,), seed=1)
    batch = next(probes.share(0, 1))[0]
    x = module.process.mix(batch.batch.latents, batch.noise, batch.sigma)
    vision = module.trunk(x, batch.sigma, batch.batch).vision[0].double()
    marker = 0.05 * vision[:, 1]
    cosine = marker / (marker.square() + vision[:, 0].square()).sqrt()
    logits = gain**2 * 8**0.5 * cosine
    text = sample.text.shape[0]
    weights = torch.cat([logits.exp(), torch.ones(text)])
    weights = weights / weights.sum()
    # Text queries are zero and attend to all alike.
    alpha = (len(logits) * weights[: len(logits)] + text / len(weights)) / len(weights)
    return alpha.max().item(), int(alpha.argmax())


def test_planted_head_is_found_with_its_closed_form_and_no_other(planted_base):
    base, direction = planted_base
    module, samples = build(base), marked_samples(direction)
    callback, got = measure(module, samples)
    expected = np.zeros((2, 2), dtype=bool)
    expected[0, 1] = True  # layers 1 and 2 are measured
    assert got["layers"].tolist() == [1, 2]
    assert np.array_equal(got["consistent"], expected)
    assert got["frequency"][:, 0, 1, 3].tolist() == [1.0, 1.0]
    assert got["frequency"][:, ~expected, 3].max() == 0.0
    for p, sample in enumerate(samples):
        for s, sigma in enumerate(SIGMAS):
            alpha, key = closed_form(module, sample, sigma, SINK.gain)
            assert got["alpha"][p, s, 0, 1] == pytest.approx(alpha, rel=1e-4)
            assert got["alpha_key"][p, s, 0, 1] == got["key"][p, s, 0, 1, 3] == key
    scalars = callback.scalars(got)
    assert scalars["heads"] == 1 and scalars["max_frequency"] == 1.0
    assert scalars["alpha_max"] == pytest.approx(got["alpha"][:, :, 0, 1].mean())
    # Tokens of the prompts: frames 0, 1, 0 and three places.
    assert got["place_p"] == 1.0 and 0.5 < got["frame_p"] <= 1.0
    figures = callback.figures(module, got, "base")
    assert figures.keys() == {"sinks", "positions"}


def test_samples_of_one_caption_make_no_frequency_surer(planted_base):
    base, direction = planted_base
    samples = marked_samples(direction)
    samples[2] = replace(samples[2], text=samples[0].text.clone())
    _, got = measure(build(base), samples)
    assert got["caption_ids"].tolist() == [0, 1, 0]
    assert got["frequency_low"][0, 0, 1, 3] == pytest.approx(wilson_interval(np.array(2.0), 2)[0])


def test_the_planted_head_is_no_sink_in_fresh_blocks(planted_base):
    base, direction = planted_base
    callback, got = measure(build(base, init="dit"), marked_samples(direction))
    assert got["frequency"][:, 0, 1, 3].max() == 0.0
    assert not got["consistent"].any() and callback.scalars(got)["heads"] == 0


@pytest.mark.parametrize("layers, expected", [("all", [0, 1, 2]), ([0], [0]), ([2, 0], [0, 2])])
def test_layers_of_the_trunk_can_be_measured(planted_base, layers, expected):
    base, direction = planted_base
    module, samples = build(base, init="dit"), marked_samples(direction)
    _, got = measure(module, samples, layers=layers)
    assert got["layers"].tolist() == expected
    assert got["frequency"][:, 0, 0, 3].tolist() == [1.0, 1.0]  # the trunk's sink is still there
    if layers == "all":
        alone = measure(module, samples, layers=[0])[1]
        np.testing.assert_array_equal(got["alpha"][:, :, :1], alone["alpha"])


def test_shapes_and_dtypes_of_the_file(planted_base):
    base, direction = planted_base
    _, got = measure(build(base), marked_samples(direction), eps=(0.1, 0.3))
    prompts, sigmas, layers, heads, eps = 3, 2, 2, 2, 2
    for name in ("fraction", "key", "text_fraction"):
        assert got[name].shape == (prompts, sigmas, layers, heads, eps), name
    for name in ("alpha", "alpha_key", "text_alpha", "value_norm_ratio", "projected_value_norm_ratio"):
        assert got[name].shape == (prompts, sigmas, layers, heads), name
    for name in ("frequency", "frequency_low", "frequency_high"):
        assert got[name].shape == (sigmas, layers, heads, eps), name
    assert got["grid"].tolist() == [2, 2, 3] and got["text_tokens"].tolist() == [3, 0, 3]
    assert (got["queries"], got["keys_count"]) == (15, 15)
    assert got["keys"].tolist() == ["clip-0", "clip-1", "clip-2"] and not any(a.dtype.hasobject for a in got.values())
    assert (got["frequency_low"] <= got["frequency"]).all() and (got["frequency"] <= got["frequency_high"]).all()


def test_text_sink_is_no_sink_but_is_reported(planted_base):
    base, direction = planted_base
    module = build(base)
    attention = module.split_model.transformer.transformer_blocks[2].attn1
    with (
        torch.no_grad()
    ):  # every vision query and every text key of head 0 point the same way: the caption attracts all
        rows = slice(0, 8)
        attention.norm_q.weight.fill_(8.0)
        attention.norm_added_k.weight.fill_(1.0)
        for projection, column in ((attention.to_q, 0), (attention.to_k, 0)):
            projection.weight[rows] = 0.0
            projection.weight[0 if projection is attention.to_q else 2, column] = 1.0
        attention.add_k_proj.weight[rows] = 0.0
        attention.add_k_proj.weight[0] = torch.randn(
            attention.add_k_proj.in_features, generator=torch.Generator().manual_seed(0)
        )
    samples = marked_samples(direction, text_lengths=(1, 1, 1))
    _, got = measure(module, samples, layers=[2], prompts=3)
    sign_positive = got["text_alpha"][..., 0, 0] > 0.5  # the random direction may point away in some prompt
    assert sign_positive.any()
    assert (got["text_fraction"][..., 0, 0, 3][sign_positive] > 0.9).all()
    assert got["frequency"][:, 0, 0, 3].max() < 1.0
    assert (got["fraction"][..., 0, 0, 3][sign_positive] < 0.5).all()


def test_attention_functions_come_off_also_when_something_raises(planted_base, monkeypatch):
    base, direction = planted_base
    module = build(base)
    before = [processor.attend for processor in module.split_model._processors.values()]
    monkeypatch.setattr("trainer.callbacks.sinks.sink_statistics", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(module, marked_samples(direction))
    assert [processor.attend for processor in module.split_model._processors.values()] == before


def test_wrong_settings_are_named(planted_base):
    with pytest.raises(ValueError, match="got eps"):
        SinkFrequency(eps=(0.1, 0.5))
    with pytest.raises(ValueError, match="got layers=\\[7\\]"):
        SinkFrequency(layers=[7]).check(build(planted_base[0]))
    with pytest.raises(ValueError, match="got sigmas"):
        SinkFrequency(sigmas=(0.5, 1.5))
    with pytest.raises(ValueError, match="got prompts=0"):
        SinkFrequency(prompts=0)
