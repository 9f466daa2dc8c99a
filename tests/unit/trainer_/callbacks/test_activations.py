"""The largest and median magnitude of the residual stream: by a plain loop, and where one entry was made massive."""

import numpy as np
import pytest
import torch

from data.batch import Sample
from tests.support.measured_fits import files, fit
from trainer.callbacks.activations import MassiveActivations, largest_and_median
from trainer.callbacks.measurement_files import load_arrays
from trainer.callbacks.probe_set import ProbeSet
from trainer.module import RetrainBlocks, SurgeryConfig

SIGMAS = (0.2, 0.7)


def build(base, **surgery):
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(**({"last": 2} | surgery), init="keep"))
    module.build("cpu")
    return module


def draw_samples(lengths):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randn(4, 2, 4, 6, generator=generator), torch.randn(n, 16, generator=generator), f"clip-{i}", i)
        for i, n in enumerate(lengths)
    ]


@torch.no_grad()
def measure(module, lengths=(3, 0, 3)):
    callback = MassiveActivations(prompts=len(lengths), sigmas=SIGMAS)
    probes, tables, batches = ProbeSet(draw_samples(lengths), SIGMAS, seed=1), {}, []
    for batch, _ in probes.share(0, 1):
        batches.append(batch)
        for name, found in callback.observe(module, batch).items():
            table = tables.setdefault(name, np.zeros((len(lengths), len(SIGMAS), *found.shape[1:])))
            table[list(batch.prompts), list(batch.strata)] = found.double().numpy()
    return callback, callback.summarise(module, probes, tables), batches


def test_largest_and_median_of_known_numbers():
    stream = torch.tensor([[[1.0, -2.0, 3.0], [-9.0, 0.5, 4.0]]])
    found = {name: value.item() for name, value in largest_and_median(stream).items()}
    assert found == {"largest": 9.0, "token": 1, "channel": 0, "median": 2.0}  # of an even count, the lower one


@torch.no_grad()
def test_every_depth_equals_a_plain_loop_over_the_blocks(base_folder):
    module = build(base_folder)
    _, arrays, batches = measure(module)
    assert arrays["depths"].tolist() == [1, 2, 3]
    for batch in batches:
        x = module.process.mix(batch.batch.latents, batch.noise, batch.sigma)
        state = module.trunk(x, batch.sigma, batch.batch)
        for row, depth in enumerate((1, 2, 3)):
            for i, (prompt, stratum) in enumerate(zip(batch.prompts, batch.strata, strict=True)):
                magnitude = state.vision[i].abs().numpy()
                length = batch.batch.text_lengths[i]
                text = state.text[i, :length].abs().numpy()
                assert arrays["largest"][prompt, stratum, row] == magnitude.max()
                token, channel = np.unravel_index(magnitude.argmax(), magnitude.shape)
                assert (arrays["token"][prompt, stratum, row], arrays["channel"][prompt, stratum, row]) == (
                    token,
                    channel,
                )
                assert arrays["median"][prompt, stratum, row] == pytest.approx(np.median(magnitude), rel=0.05)
                assert arrays["text_largest"][prompt, stratum, row] == (text.max() if length else 0.0)
            if depth < 3:
                state = module.split_model.run(state, depth, depth + 1)


@torch.no_grad()
def test_a_channel_that_was_made_massive_is_found(base_folder):
    module = build(base_folder, last=3)
    callback, before, _ = measure(module)
    assert not before["massive"].any()
    module.split_model.transformer.patch_embed.proj.bias[5] = 1e5
    _, after, _ = measure(module)
    assert after["massive"].all() and (after["channel"] == 5).all()
    assert callback.scalars(after)["massive_share"] == 1.0
    assert callback.scalars(after)["largest"] == pytest.approx(1e5, rel=0.01)


def test_a_fit_leaves_its_files_and_its_losses_are_those_without(base_folder, tmp_path):
    measured = fit(tmp_path / "with", base_folder, [MassiveActivations(prompts=3, sigmas=SIGMAS)])
    plain = fit(tmp_path / "without", base_folder, [])
    for name, value in plain.retrained_parameters().items():
        assert torch.equal(value, measured.retrained_parameters()[name]), name
    stages = ("base", "epoch-000", "epoch-001", "epoch-002")
    assert files(tmp_path / "with", "measurements") == [f"activations-{stage}.npz" for stage in stages]
    assert load_arrays(tmp_path / "with" / "measurements" / "activations-base.npz")["largest"].shape == (3, 2, 3)
