"""Masking robustness on whole tiny Mochi models: a float64 brute force, and models whose answer is known."""

import math

import numpy as np
import pytest
import torch

from data.batch import Sample
from tests.support.masking_brute_force import brute_force
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.masking_statistics import FLOOR
from trainer.callbacks.probe_set import ProbeSet
from trainer.module import RetrainBlocks, SurgeryConfig

SIGMAS = (0.2, 0.7)


def draw_samples(lengths=(3, 0, 3)):
    generator = torch.Generator().manual_seed(0)
    return [
        Sample(torch.randn(4, 2, 4, 6, generator=generator), torch.randn(n, 16, generator=generator), f"clip-{i}", i)
        for i, n in enumerate(lengths)
    ]


def build(base, init="keep", **surgery):
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(**({"last": 2} | surgery), init=init))
    module.build("cpu")
    return module


@torch.no_grad()
def measure(module, lengths=(3, 0, 3), **kwargs):
    callback = MaskingRobustness(**{"prompts": len(lengths), "sigmas": SIGMAS} | kwargs)
    callback.check(module)
    probes = ProbeSet(draw_samples(lengths), SIGMAS, seed=1)
    tables = {}
    for batch, _ in probes.share(0, 1):
        for name, found in callback.observe(module, batch).items():
            table = tables.setdefault(name, np.zeros((len(lengths), len(SIGMAS), *found.shape[1:])))
            table[list(batch.prompts), list(batch.strata)] = found.double().numpy()
    return callback, callback.summarise(module, probes, tables)


def test_agrees_with_a_brute_force_over_stored_float64_weights(base_folder):
    module = build(base_folder)
    _, got = measure(module, ratios=(0.3, 0.8), scopes=("retrained", "each", "all", "but-1", "last-2"))
    scopes = {
        "retrained": [1, 2],
        "layer-01": [1],
        "layer-02": [2],
        "all": [0, 1, 2],
        "but-1": [0, 2],
        "last-2": [1, 2],
    }
    assert got["scopes"].tolist() == list(scopes)
    assert [np.flatnonzero(row).tolist() for row in got["scope_layers"]] == list(scopes.values())
    probes = ProbeSet(draw_samples(), SIGMAS, seed=1)
    for k, layers in enumerate(scopes.values()):
        for r, ratio in enumerate((0.3, 0.8)):
            with torch.no_grad():
                distortion, increase, dense_loss, realised = brute_force(module, probes, layers, ratio)
            # Inputs of later layers differ in rounding, so a weight next to the threshold may fall on its other side.
            assert got["distortion"][k, r] == pytest.approx(distortion, rel=0.05)
            assert got["loss_increase"][k, r] == pytest.approx(increase, rel=0.05, abs=1e-3 * dense_loss)
            assert got["realised_ratio"][k, r] == pytest.approx(realised, abs=0.003)
            assert got["dense_loss"] == pytest.approx(dense_loss, rel=1e-4)
    assert (got["distortion"] > 1e-6).all()


def test_shapes_and_how_the_figures_hang_together(base_folder):
    callback, got = measure(build(base_folder), ratios=(0.2, 0.5, 0.9))
    scopes, sigmas, ratios = 4, 2, 3
    for name in ("distortion", "loss_increase", "realised_ratio", "dropped_mass"):
        assert got[name].shape == (scopes, ratios), name
    for name in ("distortion_by_sigma", "loss_increase_by_sigma"):
        assert got[name].shape == (scopes, sigmas, ratios), name
    for name in ("auc", "critical_ratio", "uniform_distortion", "uniform_loss_increase"):
        assert got[name].shape == (scopes,), name
    assert (got["prompts"], got["samples"]) == (3, 6)
    np.testing.assert_allclose(got["auc"], np.log10(got["distortion"] + FLOOR).mean(axis=1))
    np.testing.assert_allclose(got["loss_increase_by_sigma"].mean(axis=1), got["loss_increase"], atol=1e-9)
    np.testing.assert_allclose(got["dense_loss_by_sigma"].mean(), got["dense_loss"])
    assert (np.diff(got["dropped_mass"], axis=1) > 0).all() and (np.diff(got["realised_ratio"], axis=1) > 0).all()
    scalars = callback.scalars(got)
    costs = dict(zip(got["scopes"].tolist(), got["uniform_loss_increase"] >= 0.01 * got["dense_loss"], strict=True))
    assert {name: f"{name}/critical_ratio" in scalars for name in costs} == costs and any(costs.values())
    for index, (scope, measured) in enumerate(costs.items()):
        assert not measured or scalars[f"{scope}/critical_ratio"] == got["critical_ratio"][index]
    assert scalars["layer-02/auc"] == got["auc"][2] and scalars["dense_loss"] == got["dense_loss"]
    assert callback.figures(build(base_folder), got, "base").keys() == {"masking"}


def test_distortion_is_a_quotient_of_means_not_a_mean_of_quotients(base_folder):
    callback = MaskingRobustness(prompts=1, sigmas=SIGMAS, ratios=(0.5,), scopes=("retrained",))
    masked = {name: np.full((1, 2, 1, 1), 0.3) for name in ("change", "loss", "realised", "dropped")}
    uniform = {"uniform_change": np.full((1, 2, 1), 4.0), "uniform_loss": np.full((1, 2, 1), 0.5)}
    dense = {"energy": np.array([[1.0, 3.0]]), "dense_loss": np.array([[0.2, 0.4]])}
    probes = ProbeSet(draw_samples((3,)), SIGMAS, seed=1)
    got = callback.summarise(build(base_folder), probes, masked | uniform | dense)
    assert got["distortion"][0, 0] == pytest.approx(0.15) and got["uniform_distortion"][0] == pytest.approx(2.0)
    assert got["distortion_by_sigma"][0, :, 0].tolist() == pytest.approx([0.3, 0.1])
    assert got["loss_increase"][0, 0] == pytest.approx(0.0) and got["uniform_loss_increase"][0] == pytest.approx(0.2)
    assert got["loss_increase_by_sigma"][0, :, 0].tolist() == pytest.approx([0.1, -0.1])


def test_fresh_blocks_are_the_identity_so_masking_them_changes_nothing(base_folder):
    callback, got = measure(build(base_folder, init="dit"), ratios=(0.5, 0.9), scopes=("retrained", "layer-0"))
    assert got["distortion"][0].max() == 0 and got["loss_increase"][0].max() == 0 and got["critical_ratio"][0] == 0.9
    assert got["auc"][0] == pytest.approx(-8)
    assert got["realised_ratio"][0].min() > 0.4  # weights were removed, they only do not matter
    assert got["distortion"][1].min() > 0  # the trunk's layer does matter
    assert "retrained/critical_ratio" not in callback.scalars(got)  # nothing was learnt from it


def test_uniform_attention_ties_so_nothing_is_removed_and_the_control_is_the_model_itself(base_folder):
    module = build(base_folder)
    with torch.no_grad():
        for block in module.split_model.transformer.transformer_blocks[1:]:
            block.attn1.to_q.weight.zero_()
            block.attn1.add_q_proj.weight.zero_()
    _, got = measure(module, ratios=(0.5, 0.9), scopes=("retrained", "each"))
    assert got["realised_ratio"].max() == 0 and got["dropped_mass"].max() == 0
    assert got["distortion"].max() < 1e-10 and got["uniform_distortion"].max() < 1e-10
    assert (got["critical_ratio"] == 0.9).all()


def test_results_do_not_depend_on_where_the_trunk_ends(base_folder):
    kwargs = {"ratios": (0.5,), "scopes": ("all", "layer-2", "layer-1")}
    _, split = measure(build(base_folder, last=1), **kwargs)
    _, whole = measure(build(base_folder, last=3), **kwargs)
    for name in ("distortion", "loss_increase", "realised_ratio", "dropped_mass", "uniform_distortion"):
        np.testing.assert_array_equal(split[name], whole[name], err_msg=name)


def test_batch_size_does_not_change_the_figures(base_folder):
    module = build(base_folder)
    callback = MaskingRobustness(prompts=3, sigmas=SIGMAS, ratios=(0.5,), scopes=("retrained",))
    found = []
    for batch_size in (1, 6):
        probes = ProbeSet(draw_samples((3, 3, 3)), SIGMAS, seed=1, batch_size=batch_size)
        with torch.no_grad():
            parts = [callback.observe(module, batch) for batch, _ in probes.share(0, 1)]
        found.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0.02, atol=1e-4, msg=name)


def test_attention_functions_come_off_also_when_something_raises(base_folder, monkeypatch):
    module = build(base_folder)
    before = [processor.attend for processor in module.split_model._processors.values()]
    monkeypatch.setattr("trainer.callbacks.masking.masked_attention", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        measure(module)
    assert [processor.attend for processor in module.split_model._processors.values()] == before


@pytest.mark.parametrize(
    "scope",
    [
        "layer-3",
        "layer-",
        "layer-1-2",
        "but-7",
        "but-0-1-2",
        "but",
        "everything",
        "layer--1",
        "last-0",
        "last-4",
        "last",
    ],
)
def test_unknown_scopes_are_named(base_folder, scope):
    with pytest.raises(ValueError, match=f"got scope '{scope}'"):
        MaskingRobustness(scopes=(scope,)).check(build(base_folder))


@pytest.mark.parametrize("ratios", [(), (0.0, 0.5), (0.5, 1.0), (0.5, 0.1), (0.1, 0.1)])
def test_wrong_ratios_are_named(ratios):
    with pytest.raises(ValueError, match="got ratios"):
        MaskingRobustness(ratios=ratios)


def test_no_scope_is_named():
    with pytest.raises(ValueError, match="got no scopes"):
        MaskingRobustness(scopes=())


def by_hand(module, probe, layers, ratio, keys, quantile, removed):
    """(change, loss, realised, dropped) of one probe from stored float64 weights, row by row, for every option."""
    thresholds, found = {}, []

    def weights_of(q, k):
        return torch.softmax(q.double() @ k.double().transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)

    def dense(q, k, v, call):
        weights = weights_of(q, k)
        pool = weights[..., : 12 if keys == "vision" else None]
        ordered = (pool if quantile == "row" else pool.flatten(2)).sort(dim=-1).values
        at = math.floor(ratio * ordered.shape[-1])
        limit = ordered[..., at] * (1 - 1e-5)  # just below it, so that rounding moves no weight across
        thresholds[call.layer] = limit if quantile == "row" else limit[..., None].expand(q.shape[:3])
        return (weights @ v.double()).to(v.dtype)

    def masked(q, k, v, call):
        weights = weights_of(q, k)
        removable = 12 if keys == "vision" else weights.shape[-1]
        lost = []
        for place in np.ndindex(*weights.shape[:3]):
            row = weights[place].clone()
            gone = [i for i in range(removable) if row[i] < min(thresholds[call.layer][place], row.max())]
            lost.append((len(gone) / removable, row[gone].sum().item()))
            mean = row[gone].mean() if gone else 0.0
            row[gone] = mean if removed == "mean" else 0.0
            weights[place] = row / row.sum() if removed == "renormalise" else row
        found.append(np.mean(lost, axis=0))
        return (weights @ v.double()).to(v.dtype)

    x = module.process.mix(probe.batch.latents, probe.noise, probe.sigma)
    target = module.process.target(probe.batch.latents, probe.noise, probe.sigma)
    with module.split_model.attention(dict.fromkeys(layers, dense)):
        base = module.velocity(x, probe.sigma, probe.batch)
    with module.split_model.attention(dict.fromkeys(layers, masked)):
        got = module.velocity(x, probe.sigma, probe.batch)
    squares = [difference.double().square().mean().item() for difference in (got - base, got - target)]
    return [*squares, *np.mean(found, axis=0)]


@pytest.mark.parametrize("keys", ["all", "vision"])
@pytest.mark.parametrize("quantile", ["head", "row"])
@pytest.mark.parametrize("removed", ["renormalise", "zero", "mean"])
def test_every_option_agrees_with_weights_changed_by_hand(base_folder, keys, quantile, removed):
    module, ratio = build(base_folder), 0.6
    options = {"keys": keys, "quantile": quantile, "removed": removed}
    callback = MaskingRobustness(sigmas=SIGMAS, ratios=(ratio,), scopes=("layer-1", "but-1"), **options)
    probe = ProbeSet(draw_samples((5,)), (0.4,), seed=1)._collate([(0, 0)])
    with torch.no_grad():
        got = callback.observe(module, probe)
        for scope, layers in enumerate(([1], [0, 2])):
            expected = by_hand(module, probe, layers, ratio, keys, quantile, removed)
            for name, value in zip(("change", "loss", "realised", "dropped"), expected, strict=True):
                assert got[name][0, scope, 0].item() == pytest.approx(value, rel=1e-3), (name, layers)


def test_options_are_written_down_and_titled(base_folder):
    module, title = build(base_folder), {}
    for options in ({}, {"keys": "vision", "quantile": "row", "removed": "mean"}):
        callback, got = measure(module, ratios=(0.5,), scopes=("retrained",), **options)
        assert [str(got[name]) for name in ("masked_keys", "quantile", "removed")] == [
            options.get("keys", "all"), options.get("quantile", "head"), options.get("removed", "renormalise"),
        ]  # fmt: skip
        title[len(options)] = callback.figures(module, got, "base")["masking"].get_suptitle()
    assert "vision" not in title[0] and "row" not in title[0]
    assert "on vision keys only, thresholds per row, replaced by their mean" in title[3]


@pytest.mark.parametrize("option", ["keys", "quantile", "removed"])
def test_wrong_options_are_named(option):
    with pytest.raises(ValueError, match=f"got {option}='text', expected one of"):
        MaskingRobustness(**{option: "text"})


def test_the_figures_of_all_probes_are_kept_and_their_means_are_the_figures(base_folder):
    _, arrays = measure(build(base_folder), scopes=("retrained", "all"), ratios=(0.5, 0.9))
    shape = (3, len(SIGMAS), 2, 2)
    assert arrays["loss_by_probe"].shape == arrays["change_by_probe"].shape == shape
    dense = arrays["dense_loss_by_probe"]
    increase = (arrays["loss_by_probe"] - dense[..., None, None]).mean(axis=(0, 1))
    np.testing.assert_allclose(increase, arrays["loss_increase"], atol=1e-6)
    distortion = arrays["change_by_probe"].mean(axis=(0, 1)) / arrays["energy_by_probe"].mean()
    np.testing.assert_allclose(distortion, arrays["distortion"], rtol=1e-4)
    assert dense.mean() == pytest.approx(arrays["dense_loss"], rel=1e-6)
    uniform = (arrays["uniform_loss_by_probe"] - dense[..., None]).mean(axis=(0, 1))
    np.testing.assert_allclose(uniform, arrays["uniform_loss_increase"], atol=1e-6)
    assert arrays["keys"].tolist() == ["clip-0", "clip-1", "clip-2"] and arrays["caption_ids"].tolist() == [0, 1, 2]
