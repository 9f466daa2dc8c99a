"""A fit that is stopped goes on with exactly the batch after the last one, and loads none of those before."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from data.modules.latents import LatentDataModule
from data.storage.store import Store
from data.stream.split import Split
from tests.support.fits import BATCHES, EPOCHS, Recorder, every_step, fit
from tests.support.latent_shards import write_latents


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Latent shards of 32 samples: 28 for training, 4 held out."""
    return write_latents(tmp_path_factory.mktemp("latents"), [("1x16x16", 8)] * 4)


class Killed(Exception):
    pass


class KillAt(Callback):
    """Stops in the middle of the given step, and saves then, as a callback for preemption would."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if len(module.steps) == self.step:
            trainer.save_checkpoint(self.path)
            raise Killed


@pytest.fixture(scope="module")
def uninterrupted(shards, tmp_path_factory):
    """All steps of a whole fit, and its checkpoint after each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    steps = fit(shards, callbacks=[every_step(folder)])
    assert len(steps) == BATCHES * EPOCHS
    return steps, folder


def test_every_epoch_sees_every_training_sample_once_and_no_held_out_one(uninterrupted):
    steps, _ = uninterrupted
    orders = []
    for epoch in range(EPOCHS):
        mine = [uids for e, _, uids in steps if e == epoch]
        orders.append([uid for uids in mine for uid in uids])
        assert len(mine) == BATCHES and sorted(orders[-1]) == list(range(28))
    assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("step", range(1, BATCHES * EPOCHS + 1))
def test_a_fit_goes_on_at_the_next_batch(shards, uninterrupted, step):
    steps, folder = uninterrupted
    assert fit(shards, checkpoint=folder / f"step={step}.ckpt") == steps[step:]


@pytest.mark.slow
@pytest.mark.parametrize("step", sorted(random.Random(0).sample(range(1, BATCHES * EPOCHS), 3)))
def test_with_loader_processes_too(shards, uninterrupted, step):
    steps, folder = uninterrupted
    assert fit(shards, workers=2, checkpoint=folder / f"step={step}.ckpt") == steps[step:]


def test_loader_processes_run_ahead_but_the_position_does_not(shards, tmp_path, uninterrupted):
    fit(shards, workers=2, callbacks=[every_step(tmp_path)], max_steps=3, max_epochs=-1)
    state = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["LatentDataModule"]
    assert (state["epoch"], state["batches"]) == (0, 2)


@pytest.mark.parametrize("step", [1, 4, BATCHES, BATCHES + 1])
def test_a_step_that_was_not_finished_is_done_again(shards, uninterrupted, tmp_path, step):
    with pytest.raises(Killed):
        fit(shards, callbacks=[KillAt(step, tmp_path / "last.ckpt")])
    assert fit(shards, checkpoint=tmp_path / "last.ckpt") == uninterrupted[0][step - 1 :]


@pytest.mark.parametrize("step", [3, 8, 10])
def test_a_fit_that_counts_steps(shards, uninterrupted, step):
    steps, folder = uninterrupted
    checkpoint = folder / f"step={step}.ckpt"
    assert fit(shards, checkpoint=checkpoint, max_epochs=-1, max_steps=17) == steps[step:17]


@pytest.mark.parametrize("when", ["train", "validation"])
def test_a_fit_that_counts_steps_goes_on_after_an_epoch(shards, uninterrupted, tmp_path, when):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "train")
    fit(shards, callbacks=[saver])
    for epoch in range(EPOCHS):
        for options in ({"max_epochs": -1, "max_steps": 20}, {"max_epochs": EPOCHS, "max_steps": 30}):
            rest = uninterrupted[0][BATCHES * (epoch + 1) : options["max_steps"]]
            assert fit(shards, checkpoint=tmp_path / f"epoch={epoch}.ckpt", **options) == rest


@pytest.mark.parametrize("options", [{"max_epochs": 1}, {"max_epochs": -1, "max_steps": BATCHES}])
@pytest.mark.parametrize("then", [{}, {"max_epochs": -1, "max_steps": 17}])
def test_a_checkpoint_of_a_fit_that_has_ended_with_an_epoch(shards, uninterrupted, tmp_path, options, then):
    fit(shards, callbacks=[SaveAfter(tmp_path / "end.ckpt")], **options)
    assert fit(shards, checkpoint=tmp_path / "end.ckpt", **then) == uninterrupted[0][BATCHES : then.get("max_steps")]


class SaveAfter(Callback):
    """Saves when a fit has ended."""

    def __init__(self, path: Path):
        self.path = path

    def on_train_end(self, trainer, module):
        trainer.save_checkpoint(self.path)


def test_a_checkpoint_of_a_fit_that_has_ended_in_mid_epoch_is_refused(shards, tmp_path):
    """Lightning counts that epoch as done: its rest would be left out without a word."""
    end, epoch = tmp_path / "end.ckpt", ModelCheckpoint(tmp_path, filename="epoch", save_on_train_epoch_end=True)
    fit(shards, callbacks=[SaveAfter(end), epoch], max_steps=3)
    for path in (end, tmp_path / "epoch.ckpt"):
        for then in ({}, {"max_steps": 17}):
            with pytest.raises(ValueError, match="after a fit had stopped at 3 of 7 batches of epoch 0"):
                fit(shards, checkpoint=path, **then)


def test_an_epoch_that_a_callback_cuts_short_is_over(shards, tmp_path):
    class Cut(Recorder):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 4 else None

    found = []
    for checkpoint in (None, tmp_path / "epoch=0.ckpt"):
        saver = [] if checkpoint else [ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)]
        found.append(fit(shards, module=Cut(), callbacks=saver, checkpoint=checkpoint))
    assert [step[:2] for step in found[0]] == [(epoch, batch) for epoch in range(EPOCHS) for batch in range(4)]
    assert found[1] == found[0][4:]


def test_under_gradient_accumulation(shards, uninterrupted, tmp_path):
    steps = fit(shards, callbacks=[every_step(tmp_path)], accumulate_grad_batches=3)
    assert steps == uninterrupted[0]
    for step, batches in ((1, 3), (3, 7), (4, 10)):  # the last step of an epoch has what is left
        assert fit(shards, checkpoint=tmp_path / f"step={step}.ckpt", accumulate_grad_batches=3) == steps[batches:]


@pytest.mark.parametrize("when", ["train", "validation"])
def test_checkpoints_at_the_end_of_an_epoch(shards, uninterrupted, tmp_path, when):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=when == "train")
    fit(shards, callbacks=[saver])
    for epoch in range(EPOCHS):
        rest = uninterrupted[0][BATCHES * (epoch + 1) :]
        assert fit(shards, checkpoint=tmp_path / f"epoch={epoch}.ckpt") == rest


def test_consumed_samples_are_not_loaded(shards, uninterrupted, monkeypatch):
    steps, folder = uninterrupted
    read, original = [], Split.__getitem__

    def noting(self, visit):
        read.append(visit)
        return original(self, visit)

    monkeypatch.setattr(Split, "__getitem__", noting)
    fit(shards, checkpoint=folder / "step=18.ckpt", limit_val_batches=0)
    assert read == [uid for _, _, uids in steps[18:] for uid in uids]


def test_making_loaders_leaves_the_global_random_state_alone(shards):
    data = LatentDataModule(shards=shards, val_samples=4, batch_size=4)
    before = torch.random.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        list(loader)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_global_batch_is_refused_in_mid_epoch_only(shards, uninterrupted):
    _, folder = uninterrupted
    other = LatentDataModule(shards=shards, val_samples=4, batch_size=2)
    with pytest.raises(ValueError, match="3 batches into an epoch with 4 samples per global batch, this run has 2"):
        fit(shards, data=other, checkpoint=folder / "step=3.ckpt")
    state = {"epoch": 0, "batches": 3, "global_batch_size": 4}
    other.load_state_dict({**state, "epoch": 1})  # epoch 0 begins anew
    assert len(list(other.train_dataloader())) == 14


@pytest.mark.parametrize("options", [{}, {"max_epochs": -1, "max_steps": BATCHES + 28}])
def test_another_global_batch_is_taken_after_an_epoch(shards, tmp_path, options):
    saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    fit(shards, callbacks=[saver], max_epochs=1)
    other = LatentDataModule(shards=shards, val_samples=4, batch_size=2)
    steps = fit(shards, data=other, checkpoint=tmp_path / "epoch=0.ckpt", **options)
    assert [step[:2] for step in steps] == [(epoch, batch) for epoch in (1, 2) for batch in range(14)]


@pytest.mark.parametrize("wrong", [{"reload_dataloaders_every_n_epochs": 0}])
def test_a_trainer_that_would_repeat_the_first_order_is_refused(shards, wrong):
    with pytest.raises(ValueError, match="each epoch has its own order"):
        fit(shards, **wrong)


def test_other_shards_or_another_seed_are_refused_in_mid_epoch_only(shards, uninterrupted, tmp_path):
    _, folder = uninterrupted
    other = write_latents(tmp_path, [("1x16x16", 8)] * 4, latent=lambda i, shape: torch.zeros(shape))
    for change in ({"shards": other}, {"seed": 1}, {"passes": 2}, {"val_samples": 5}):
        data = LatentDataModule(**{"shards": shards, "val_samples": 4, "batch_size": 4} | change)
        with pytest.raises(ValueError, match="3 batches into an epoch over other shards"):
            fit(shards, data=data, checkpoint=folder / "step=3.ckpt")
    moved = tmp_path / "moved"
    shutil.copytree(shards, moved)
    data = LatentDataModule(shards=str(moved), val_samples=4, batch_size=4)
    assert fit(shards, data=data, checkpoint=folder / "step=3.ckpt") == uninterrupted[0][3:]


def test_consumed_samples_cost_no_read(tmp_path):
    """Resumed at nine tenths of an epoch, the first batch costs one batch and the records of its shards."""
    where = write_latents(tmp_path, [("1x32x32", 40)] * 15, width=64, text=lambda i: torch.ones(24, 64))
    counted = {}
    for start in (0, 45):
        data = LatentDataModule(shards=where, val_samples=100, batch_size=10)
        data.check()
        data.load_state_dict({"epoch": 0, "batches": start})
        store = data.train_split.reader.store = Counting()
        batches = iter(data.train_dataloader())
        first = next(batches)
        counted[start] = (store.calls, store.bytes)
        rest = list(batches)
        assert len(first) == 10 and len(rest) == 49 - start
        counted[start, "whole"] = (store.calls, store.bytes)
    calls, size = counted[45]
    assert calls <= 10 + 10 and calls < 0.05 * counted[0, "whole"][0]
    assert size < 0.05 * counted[0, "whole"][1]
    assert counted[45, "whole"][1] < 0.3 * counted[0, "whole"][1]


class Counting(Store):
    """A store that counts."""

    calls = bytes = 0

    def read(self, location, offset=0, size=None, *, version=""):
        content = super().read(location, offset, size, version=version)
        self.calls += 1
        self.bytes += len(content)
        return content


class Latents(Recorder):
    """Keeps the latents that each step and each validation saw."""

    def __init__(self):
        super().__init__()
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.trained.append(batch.latents)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch.latents)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_draws_its_own_latents_also_where_it_goes_on(shards, tmp_path, workers):
    """Of validation they are the same in every epoch, and in runs of every seed."""

    def run(checkpoint=None, seed=0, **trainer):
        data = LatentDataModule(shards=shards, val_samples=4, batch_size=4, num_workers=workers, sample_latents=True,
                                seed=seed)  # fmt: skip
        module = Latents()
        fit(shards, checkpoint=checkpoint, data=data, module=module, max_epochs=2, **trainer)
        uids = [uid for _, _, uids in module.steps for uid in uids]
        return list(zip(uids, torch.cat(module.trained), strict=True)), module.validated

    whole, validated = run(callbacks=[every_step(tmp_path)])
    first, second = dict(whole[:28]), dict(whole[28:])
    assert first.keys() == second.keys() and not any(torch.equal(first[uid], second[uid]) for uid in first)
    assert torch.equal(validated[0], validated[1])
    rest, _ = run(tmp_path / f"step={BATCHES + 3}.ckpt")
    assert len(rest) == 4 * (BATCHES - 3)
    assert all(uid == u and torch.equal(x, y) for (uid, x), (u, y) in zip(rest, whole[-len(rest) :], strict=True))
    other, validated_too = run(seed=5)
    assert not any(torch.equal(latent, first[uid]) for uid, latent in other[:28])
    assert torch.equal(validated_too[0], validated[0])
