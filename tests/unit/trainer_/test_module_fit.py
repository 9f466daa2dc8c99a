"""A fit: accumulation, averages, skipped steps; what validation sees; what a checkpoint holds."""

import copy
import math

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from trainer.callbacks.random_state import RandomStateCheckpoint
from trainer.module import OptimConfig, SurgeryConfig
from trainer.objective import keyed_noise

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step`", "ignore:In CPU autocast")


# -- optimisation ----------------------------------------------------------------------------------------------------


def test_accumulation_averages_once_per_optimiser_step(make_module, make_batch, fit, make_recorder):
    """Four micro-batches of one sample are one batch of four, for weights and for the average."""
    samples = [make_batch([3], seed=i, uids=[i]) for i in range(4)]
    together = make_batch([3, 3, 3, 3], uids=range(4))
    for i, sample in enumerate(samples):
        together.latents[i], together.text[i] = sample.latents[0], sample.text[0]
    optim = OptimConfig(lr=1e-3, warmup_steps=1, eps=1e-4)
    single, parts = make_recorder(), make_recorder()
    fit(make_module(optim=optim), [together] * 2, callbacks=[single])
    module = make_module(optim=optim)
    fit(module, samples * 2, callbacks=[parts], accumulate_grad_batches=4, max_steps=2)
    assert parts.updates == [0, 0, 0, 1, 1, 1, 1, 2] and single.updates == [1, 2]
    for name, want in single.weights[-1].items():
        torch.testing.assert_close(parts.weights[-1][name], want, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(parts.average[-1][name], single.average[-1][name], rtol=1e-4, atol=1e-6)
    assert all(torch.equal(v, parts.weights[2][n]) for n, v in parts.weights[0].items()), "moved within a micro-batch"


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_a_short_last_window_is_a_mean_over_its_own_batches(make_module, make_batch, fit, make_recorder, accumulate):
    """Five batches to an epoch, against a loop by hand."""
    optim = OptimConfig(lr=1e-3, warmup_steps=1, eps=1e-4, clip_norm=0.0)
    module, recorder = make_module(optim=optim, caption_dropout=0.0), make_recorder()
    hand, batches = copy.deepcopy(module), [make_batch([2, 3], seed=n, uids=[2 * n, 2 * n + 1]) for n in range(5)]
    optimizer, norms = hand.configure_optimizers()["optimizer"], []
    for epoch in range(2):
        for first in range(0, 5, accumulate):
            window = batches[first : first + accumulate]
            noise = [hand.flow.noise(epoch, batch.uids, batch.latents.shape[1:]) for batch in window]
            sigma = [hand.flow.sigma(epoch, batch.uids) for batch in window]
            torch.cat([hand.losses(*given) for given in zip(window, noise, sigma, strict=True)]).mean().backward()
            norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in hand.retrained_parameters().values()])))
            optimizer.step()
            optimizer.zero_grad()
    fit(module, batches, callbacks=[recorder], accumulate_grad_batches=accumulate, max_steps=-1, max_epochs=2)
    ends = [n for n in range(10) if (n % 5 + 1) % accumulate == 0 or n % 5 == 4]
    assert [recorder.metrics[n]["train/grad_norm"] for n in ends] == pytest.approx(norms, rel=1e-4)
    for name, want in hand.retrained_parameters().items():
        torch.testing.assert_close(recorder.weights[-1][name], want.detach(), rtol=1e-4, atol=1e-6)


def test_average_follows_its_closed_form_through_a_fit(make_module, make_batch, fit, make_recorder):
    module, recorder = make_module(ema_decay=0.3, optim=OptimConfig(lr=1e-2, warmup_steps=1)), make_recorder()
    want = {name: p.detach().clone().double() for name, p in module.retrained_parameters().items()}
    fit(module, [make_batch([2])] * 6, callbacks=[recorder])
    for n, weights in enumerate(recorder.weights):
        decay = min(0.3, (1 + n) / (10 + n))
        for name, value in weights.items():
            want[name] = decay * want[name] + (1 - decay) * value.double()
            torch.testing.assert_close(recorder.average[n][name].double(), want[name], rtol=1e-5, atol=1e-7)


def poisoned(batch, where):
    batch = copy.deepcopy(batch)
    batch.latents[where] = math.nan if where == 0 else math.inf
    return batch


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_non_finite_step_changes_nothing_and_is_counted(
    make_module, make_batch, fit, precision, accumulate, make_recorder
):
    good, recorder = make_batch(), make_recorder()
    module = make_module()
    batches = [good] * 4 * accumulate
    batches[2 * accumulate] = poisoned(good, 0)  # the first of its step, so that good ones come on top
    fit(module, batches, callbacks=[recorder], precision=precision, accumulate_grad_batches=accumulate,
        max_steps=4)  # fmt: skip
    after = [recorder.weights[i * accumulate + accumulate - 1] for i in range(4)]
    ema = [recorder.average[i * accumulate + accumulate - 1] for i in range(4)]
    adam = [recorder.adam[i * accumulate + accumulate - 1] for i in range(4)]
    for name in after[0]:
        assert torch.equal(after[2][name], after[1][name]) and torch.equal(ema[2][name], ema[1][name]), name
    for index, state in adam[1].items():
        assert all(torch.equal(adam[2][index][key], value) for key, value in state.items()), index
    changed = [name for name in after[0] if not torch.equal(after[3][name], after[2][name])]
    assert len(changed) > len(after[0]) // 2, "training goes on after the bad step"
    assert module.skipped == 1 and module.skipped_in_row == 0
    assert [recorder.updates[i * accumulate + accumulate - 1] for i in range(4)] == [1, 2, 2, 3]
    assert recorder.metrics[-1]["train/skipped"] == 1


@pytest.mark.parametrize("where", [0, 1])
def test_the_run_stops_past_the_limit(make_module, make_batch, fit, where):
    module = make_module(optim=OptimConfig(max_skipped_in_row=2, warmup_steps=1))
    good, bad = make_batch(), poisoned(make_batch(), where)
    fit(module, [bad, bad, good, bad, bad])
    assert module.skipped == 4 and module.skipped_in_row == 2
    module = make_module(optim=OptimConfig(max_skipped_in_row=2, warmup_steps=1))
    with pytest.raises(RuntimeError, match=r"3 steps in a row.*limit 2.*stopped at step 3.*reblock inspect"):
        fit(module, [good, bad, bad, bad, good, good])


def test_non_finite_gradients_of_a_finite_loss_are_skipped(make_module, make_batch, fit, make_recorder):
    module, recorder = make_module(), make_recorder()
    module.split_model.transformer.transformer_blocks[2].ff.net[2].weight.register_hook(
        lambda grad: grad * math.inf if module.trainer.global_step == 1 else grad
    )
    fit(module, [make_batch()] * 3, callbacks=[recorder])
    assert module.skipped == 1
    assert all(torch.equal(value, recorder.weights[0][name]) for name, value in recorder.weights[1].items())
    assert all(torch.isfinite(value).all() for value in recorder.weights[2].values())


def test_a_non_finite_loss_with_finite_gradients_is_skipped(make_module, make_batch, fit, monkeypatch, make_recorder):
    """Squares overflow before gradients do; every rank must see it, so it has to show in the gradients."""
    module, recorder = make_module(), make_recorder()
    plain = module.objective_losses
    monkeypatch.setattr(
        module, "objective_losses", lambda *a: plain(*a) + (math.inf if module.global_step == 1 else 0.0)
    )
    fit(module, [make_batch()] * 3, callbacks=[recorder])
    assert module.skipped == 1
    assert all(torch.equal(value, recorder.weights[0][name]) for name, value in recorder.weights[1].items())


def test_loss_is_logged_by_sigma_band(make_module, make_batch, fit, make_recorder):
    module, recorder = make_module(caption_dropout=0.0), make_recorder()
    batch = make_batch([2] * 8, uids=range(8))
    initial = copy.deepcopy(module)
    fit(module, [batch], callbacks=[recorder])
    sigma, metrics = module.flow.sigma(0, batch.uids), recorder.metrics[0]
    losses = initial.losses(batch, initial.flow.noise(0, batch.uids, batch.latents.shape[1:]), sigma).detach()
    assert metrics["train/loss"] == pytest.approx(float(losses.mean()), rel=1e-5)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (sigma >= low) & (sigma < low + 0.25)
        name = f"train/loss_sigma_{low:.2f}-{low + 0.25:.2f}"
        expected = float(losses[inside].mean()) if inside.any() else math.nan
        assert metrics[name] == pytest.approx(expected, rel=1e-5, nan_ok=True)
    assert sum(name.startswith("train/loss_sigma") and not math.isnan(v) for name, v in metrics.items()) >= 2


def test_a_band_without_samples_does_not_show_its_last_loss(make_module, make_batch, fit, make_recorder):
    module, recorder = make_module(), make_recorder()
    fit(module, [make_batch([2], uids=[n]) for n in range(4)], callbacks=[recorder])
    for metrics in recorder.metrics:
        bands = [v for name, v in metrics.items() if name.startswith("train/loss_sigma")]
        assert len(bands) == 4 and sum(not math.isnan(v) for v in bands) == 1


def losses_by_hand(module, *batches):
    """Losses and sigmas of samples that keep their captions, in the first epoch."""
    sigma = [module.flow.sigma(0, batch.uids) for batch in batches]
    shape = batches[0].latents.shape[1:]
    losses = [module.losses(b, module.flow.noise(0, b.uids, shape), s) for b, s in zip(batches, sigma, strict=True)]
    return torch.cat(losses).detach(), torch.cat(sigma)


def test_losses_are_means_over_the_samples_of_a_step(make_module, make_batch, fit, make_recorder):
    """Micro-batches of one and three samples."""
    module, recorder = make_module(caption_dropout=0.0), make_recorder()
    initial, batches = copy.deepcopy(module), [make_batch([2], uids=[0]), make_batch([2] * 3, uids=[1, 2, 3])]
    fit(module, batches, callbacks=[recorder], accumulate_grad_batches=2)
    assert "train/loss" not in recorder.metrics[0], "the step goes on"
    losses, sigma = losses_by_hand(initial, *batches)
    assert recorder.metrics[1]["train/loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (sigma >= low) & (sigma < low + 0.25)
        expected = float(losses[inside].mean()) if inside.any() else math.nan
        name = f"train/loss_sigma_{low:.2f}-{low + 0.25:.2f}"
        assert recorder.metrics[1][name] == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_a_loss_that_is_not_finite_stays_in_its_band(make_module, make_batch, fit, make_recorder):
    module, recorder = make_module(), make_recorder()
    batch = make_batch([2] * 8, uids=range(8))
    bad = int(module.flow.sigma(0, batch.uids).argmin())
    batch.latents[bad] = math.inf
    fit(module, [batch], callbacks=[recorder])
    bands = [value for name, value in recorder.metrics[0].items() if name.startswith("train/loss_sigma")]
    assert not math.isfinite(recorder.metrics[0]["train/loss"])
    assert not math.isfinite(bands[0]) and sum(map(math.isfinite, bands)) >= 2


def test_a_step_that_was_cut_does_not_count_in_the_next_fit(make_module, make_batch, fit, make_recorder):
    module, recorder = make_module(caption_dropout=0.0), make_recorder()
    batches = [make_batch([2], seed=n, uids=[n]) for n in range(4)]

    class Cut(Callback):
        def on_train_batch_end(self, *_):
            raise KeyError("cut")

    with pytest.raises(KeyError, match="cut"):
        fit(module, batches, callbacks=[Cut()], accumulate_grad_batches=2)
    module.zero_grad()
    losses, _ = losses_by_hand(module, *batches[2:])
    fit(module, batches[2:], callbacks=[recorder], accumulate_grad_batches=2)
    assert recorder.metrics[-1]["train/loss"] == pytest.approx(float(losses.mean()), rel=1e-6)


# -- evaluation weights and checkpoints ------------------------------------------------------------------------------


def test_validation_uses_the_average_and_gives_the_weights_back(make_module, make_batch, tmp_path):
    module, batch = make_module(caption_dropout=0.0, seed=5), make_batch()
    with torch.no_grad():
        for p in module.retrained_parameters().values():
            p.add_(0.1)
    weights = {name: p.detach().clone() for name, p in module.retrained_parameters().items()}
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    got = trainer.validate(module, DataLoader([batch], batch_size=None), verbose=False)[0]
    noise = keyed_noise(0, 0, batch.uids, batch.latents.shape[1:])  # whatever the seed
    with module.evaluation_weights(), torch.no_grad():
        want = {s: float(module.losses(batch, noise, torch.full((3,), s)).mean()) for s in module.val_sigmas}
    for sigma, loss in want.items():
        assert got[f"val/loss_sigma_{sigma:.3f}"] == pytest.approx(loss, rel=1e-5)
    assert got["val/loss"] == pytest.approx(sum(want.values()) / len(want), rel=1e-5)
    assert all(torch.equal(p, weights[name]) for name, p in module.retrained_parameters().items())
    with torch.no_grad():
        assert float(module.losses(batch, noise, torch.full((3,), 0.125)).mean()) != pytest.approx(
            want[0.125], rel=1e-3
        )


def test_samples_that_only_fill_a_batch_do_not_count_in_validation(make_module, make_batch, tmp_path):
    """Alone or with repeats beside them, the held-out samples have the same mean loss."""
    module, plain = make_module(caption_dropout=0.0), make_batch([3, 3], uids=[0, 1])
    padded, empty = make_batch([3, 3, 3], uids=[0, 1, 2]), make_batch([3], uids=[5])
    padded.latents[:2], padded.text[:2] = plain.latents, plain.text
    padded.counts, empty.counts = (True, True, False), (False,)

    def losses(*batches):
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
                          default_root_dir=tmp_path, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
        return trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)[0]

    assert losses(padded, empty) == pytest.approx(losses(plain), rel=1e-5)
    padded.counts = (True, True, True)
    assert losses(padded)["val/loss"] != pytest.approx(losses(plain)["val/loss"], rel=1e-3)


def test_base_weights_are_those_of_the_files(make_module, make_transformer, make_batch, config_json):
    module, batch = make_module(), make_batch()
    want = make_transformer(seed=7)
    x, sigma = batch.latents, torch.full((3,), 0.4)
    with module.base_weights(), torch.no_grad():
        got = module.velocity(x, sigma, batch)
    stock = want(x, batch.text, module.process.timestep(sigma), batch.text_mask, return_dict=False)[0]
    torch.testing.assert_close(got, stock, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(module.velocity(x, sigma, batch), got)
    random = make_module(base=config_json, trunk_dtype="bfloat16", init="keep")
    kept = random.velocity(x, sigma, batch)
    with random.base_weights():
        assert torch.equal(random.velocity(x, sigma, batch), kept)


def test_checkpoint_holds_the_retrained_blocks_only(make_module, make_batch, fit, tmp_path):
    module = make_module()
    path = tmp_path / "last.ckpt"
    fit(module, [make_batch()] * 2, callbacks=[RandomStateCheckpoint()]).save_checkpoint(path)
    content = torch.load(path, weights_only=True)
    retrained = module.retrained_parameters()
    # Names in the file stay as they are, whatever classes and attributes are called: older files must resume.
    assert content.keys() >= {"state_dict", "optimizer_states", "lr_schedulers", "loops", "reblock", "random_states"}
    assert content["reblock"].keys() == {"blocks", "base_fingerprint", "ema", "skipped"}
    assert content["random_states"].keys() == {"torch", "cuda", "python", "numpy"}
    assert content["callbacks"] == {}
    assert content["state_dict"].keys() == {f"room.model.{name}" for name in retrained}
    assert content["reblock"]["ema"]["average"].keys() == retrained.keys()
    assert len(content["optimizer_states"][0]["state"]) == len(retrained)


def test_checkpoint_size(make_transformer, make_module, make_batch, fit, tmp_path):
    """At most 4 x 4 bytes per retrained parameter and 1 MB; the trunk here is twice that."""
    base = tmp_path / "wide"
    make_transformer(num_layers=8, num_attention_heads=8, attention_head_dim=16).save_pretrained(base)
    module = make_module(base=base, surgery=SurgeryConfig(last=2))
    path = tmp_path / "last.ckpt"
    fit(module, [make_batch()]).save_checkpoint(path)
    parameters = sum(p.numel() for p in module.retrained_parameters().values())
    assert 16 * parameters > 4e6
    assert 16 * parameters < path.stat().st_size <= 16 * parameters + 1_000_000


def test_resume_goes_on_bit_for_bit(make_module, make_batch, fit, tmp_path, make_recorder):
    batches = [make_batch(seed=i, uids=[3 * i, 3 * i + 1, 3 * i + 2]) for i in range(3)]
    whole, rest = make_recorder(), make_recorder()
    fit(make_module(), batches, callbacks=[whole], max_steps=-1, max_epochs=2)
    path = tmp_path / "first.ckpt"
    fit(make_module(), batches, max_steps=-1).save_checkpoint(path)
    resumed = make_module()
    fit(resumed, batches, callbacks=[rest], resume=path, max_steps=-1, max_epochs=2)
    assert len(rest.weights) == 3
    assert resumed.ema.updates == 6
    for name, want in whole.weights[-1].items():
        assert torch.equal(rest.weights[-1][name], want), name
        assert torch.equal(rest.average[-1][name], whole.average[-1][name]), name
    assert [m["train/loss"] for m in rest.metrics] == [m["train/loss"] for m in whole.metrics[3:]]


def test_other_runs_checkpoints_are_refused(make_module, make_transformer, make_batch, fit, tmp_path):
    path = tmp_path / "last.ckpt"
    fit(make_module(), [make_batch()]).save_checkpoint(path)
    with pytest.raises(ValueError, match=r"retrains blocks \[1, 2\], this run blocks \[2\]"):
        fit(make_module(blocks=(2,)), [make_batch()], resume=path)
    make_transformer(seed=8).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="belongs to a base with fingerprint"):
        fit(make_module(base=tmp_path / "other"), [make_batch()], resume=path)
    content = torch.load(path, weights_only=True)
    del content["reblock"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="not written by Reblock"):
        fit(make_module(), [make_batch()], resume=path)


def test_a_validation_that_raises_leaves_the_live_weights(make_module, make_batch, tmp_path, monkeypatch):
    module = make_module(optim=OptimConfig(lr=0.01, warmup_steps=1))
    batches = DataLoader([make_batch()] * 2, batch_size=None)
    seen = {}

    def raises(*_):
        seen.update({n: p.detach().clone() for n, p in module.retrained_parameters().items()})
        raise OSError("disk full")

    monkeypatch.setattr(module, "validation_step", raises)
    trainer = Trainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, max_epochs=1,
    )  # fmt: skip
    with pytest.raises(OSError, match="disk full"):
        trainer.fit(module, batches, batches)
    live = module.retrained_parameters()
    assert all(torch.equal(seen[name], average) for name, average in module.ema.average.items())
    assert any(not torch.equal(live[name], average) for name, average in module.ema.average.items())
