"""A fit that is stopped goes on with exactly the batch after the last one, and loads none of those before."""

import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.datamodule import LatentDataModule, VideoDataModule
from data.pack.pack import pack
from data.storage.store import Store
from data.stream.split import Split
from data.synth.synth import synth
from tests.latents import write_latents

BATCHES, EPOCHS = 7, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Latent shards of 32 samples: 28 for training, 4 held out."""
    return write_latents(tmp_path_factory.mktemp("latents"), [("1x16x16", 8)] * 4)


class Recorder(LightningModule):
    """Notes which samples each step saw, and draws from the global generator as dropout would."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append((self.current_epoch, batch_idx, batch.uids))
        return (self.weight - batch.latents.mean()).square().sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


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


def fit(shards, *, workers=0, checkpoint=None, callbacks=(), data=None, module=None, **trainer):
    settings = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "max_epochs": EPOCHS,
    }  # fmt: skip
    module = module or Recorder()
    data = data or LatentDataModule(shards=shards, val_samples=4, batch_size=4, num_workers=workers, passes=1)
    Trainer(**{**settings, **trainer}, callbacks=list(callbacks)).fit(module, data, ckpt_path=checkpoint)
    return module.steps


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


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


def test_passes_visit_each_sample_with_another_uid(shards):
    data = LatentDataModule(shards=shards, val_samples=4, batch_size=4, passes=2)
    batches = list(data.train_dataloader())
    assert sorted(uid for batch in batches for uid in batch.uids) == list(range(56))
    for batch in batches:
        assert [f"clip-{uid % 28:02d}" for uid in batch.uids] == list(batch.keys)


def test_validation_and_probes_are_the_held_out_end(shards):
    data = LatentDataModule(shards=shards, val_samples=4, val_batch_size=3)
    keys = [key for batch in data.val_dataloader() for key in batch.keys]
    assert keys == ["clip-28", "clip-29", "clip-30", "clip-31"]
    assert [(s.key, s.uid) for s in data.probe_samples(2)] == [("clip-28", 28), ("clip-29", 29)]
    with pytest.raises(
        ValueError, match="got 5 probe samples, expected 1 to 4, the validation samples of bucket 1x16x16"
    ):
        data.probe_samples(5)


def test_validation_shards_of_their_own(shards, tmp_path):
    other = write_latents(tmp_path, [("1x16x16", 8)], latent=lambda i, shape: torch.ones(shape))
    apart = LatentDataModule(shards=shards, val_shards=other, val_samples=5)
    assert [s.key for s in apart.probe_samples(5)] == [f"clip-{i:02d}" for i in range(5)]
    assert len(apart.train_split) == 32


def test_samples_that_are_held_out_are_nowhere_trained_on(shards, tmp_path, caplog):
    """Neither under another name of their folder nor in a copy of their shard."""
    copy, one = tmp_path / "copy", tmp_path / "one"
    shutil.copytree(shards, copy)
    os.symlink(shards, tmp_path / "link")
    shutil.copytree(write_latents(tmp_path / "new", [("1x16x16", 8)], latent=lambda i, shape: torch.ones(shape)), one)
    last = "1x16x16-000003.tar"
    for training, validation, message in (
        (shards, shards, r"000000.tar holds samples for validation: they would be trained on"),
        (shards, str(copy), rf"{copy}/.*000000.tar holds .* a copy|{copy}/.*whose copy is the training shard {shards}"),
        (shards, f"{tmp_path}/link/{last}", "000003.tar holds samples for validation"),
        (
            [shards, str(copy)],
            None,
            f"{copy}/{last} holds samples .*, whose copy is the training shard {shards}/{last}",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            LatentDataModule(shards=training, val_shards=validation, val_samples=4).check()
    for repeated in (f"{shards}/", f"{tmp_path}/link", f"{tmp_path}/x/../link", f"file://{shards}", f"{shards}/{last}"):
        with pytest.raises(ValueError, match="comes twice"):
            LatentDataModule(shards=[shards, repeated], val_samples=4).check()
    assert "is a copy of" not in caplog.text
    with caplog.at_level(logging.WARNING):
        LatentDataModule(shards=[shards, str(copy)], val_shards=str(one), val_samples=4).check()
    assert f"{copy}/{last} is a copy of {shards}/{last}" in caplog.text


def test_a_folder_is_the_same_under_its_relative_name(shards, monkeypatch):
    monkeypatch.chdir(Path(shards).parent)
    name = Path(shards).name
    for second in (f"./{name}", f"{name}/", f"../{Path.cwd().name}/{name}", shards):
        with pytest.raises(ValueError, match=f"comes twice.*{name}"):
            LatentDataModule(shards=[name, second], val_samples=4).check()


def test_a_cache_that_cannot_be_a_folder_is_refused(shards, tmp_path):
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=rf"got cache {cache}, but {tmp_path / 'file'} is not a folder"):
            LatentDataModule(shards=shards, val_samples=4, cache=str(cache)).check()
    for cache in (tmp_path, tmp_path / "new" / "below"):
        LatentDataModule(shards=shards, val_samples=4, cache=str(cache)).check()
    assert not (tmp_path / "new").exists()


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


def spoil_members(entry):
    return entry | {"safetensors": b"damaged"}


def test_damage_is_listed_once_in_the_run_folder_and_counted_for_each_batch(tmp_path):
    """Two epochs, loader processes, a resumed run: each damaged sample is named once; every batch is full."""
    damaged = (3, 12, 30)  # the last is held out
    where = write_latents(tmp_path / "s", [("1x16x16", 8)] * 4, spoil=dict.fromkeys(damaged, spoil_members))
    batches = []

    class Noting(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            batches.append(batch)

    for number in range(2):
        data = LatentDataModule(shards=where, val_samples=4, batch_size=4, num_workers=2, max_fault_share=0.2)
        checkpoint = tmp_path / "step=9.ckpt" if number else None
        saver = [every_step(tmp_path)] if not number else []
        fit(where, data=data, checkpoint=checkpoint, callbacks=[Noting(), *saver], max_epochs=2 + number,
            default_root_dir=tmp_path / "run")  # fmt: skip
        if not number:
            assert len(batches) == 14 and sum(batch.faults for batch in batches) == 4
    found = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert sorted(row["key"] for row in found) == ["clip-03", "clip-12", "clip-30"]
    assert {row["shard"].rpartition("/")[2] for row in found} == {f"1x16x16-{n:06d}.tar" for n in (0, 1, 3)}
    assert all(len(batch) == 4 for batch in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_above_the_share_of_damage_a_run_stops_and_says_why(tmp_path, workers):
    where = write_latents(tmp_path / "s", [("1x16x16", 8)] * 4, spoil=dict.fromkeys((3, 12, 13), spoil_members))
    data = LatentDataModule(shards=where, val_samples=4, batch_size=4, num_workers=workers, max_fault_share=0.05)
    with pytest.raises(ValueError, match=r"2 of 32 samples are damaged, more than max_fault_share 0\.05 allows"):
        fit(where, data=data, default_root_dir=tmp_path / "run")


def test_shards_that_are_cut_short_are_refused_before_anything_long(shards, tmp_path, caplog):
    where = tmp_path / "copy"
    shutil.copytree(shards, where)
    shard = where / "1x16x16-000002.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    data = LatentDataModule(shards=str(where), val_samples=4)
    with pytest.raises(ValueError, match=r"of 32 samples cannot be read.*1x16x16-000002.tar \(its shard has \d+ of"):
        data.check()
    with caplog.at_level(logging.WARNING):
        LatentDataModule(shards=str(where), val_samples=4, max_fault_share=0.3).check()
    assert "1x16x16-000002.tar" in caplog.text and "will be passed over" in caplog.text
    shard.unlink()
    with pytest.raises(
        ValueError, match=r"8 of 32 samples cannot be read.*8 in .*1x16x16-000002.tar \(its shard is absent"
    ):
        LatentDataModule(shards=str(where), val_samples=4).check()


def test_consumed_samples_cost_no_read(tmp_path):
    """Resumed at nine tenths of an epoch, the first batch costs one batch and the records of its shards."""
    where = write_latents(tmp_path, [("1x32x32", 40)] * 15, width=64, text=lambda i: torch.ones(24, 64))
    counted = {}
    for start in (0, 45):
        data = LatentDataModule(shards=where, val_samples=100, batch_size=10)
        data.check()
        data.load_state_dict({"epoch": 0, "batches": start})
        store = data.train_split.dataset.store = Counting()
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


def test_faults_of_a_data_module(shards, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        LatentDataModule(shards=str(tmp_path / "none")).check()
    with pytest.raises(ValueError, match="got val_samples 32 held out of 32"):
        LatentDataModule(shards=shards, val_samples=32).check()
    with pytest.raises(ValueError, match=r"got 1x16x16: 28 samples .* global batch of 29"):
        LatentDataModule(shards=shards, val_samples=4, batch_size=29).train_dataloader()
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        LatentDataModule(shards=shards, batch_size=0)
    for none in ([], "", [shards, ""]):
        with pytest.raises(ValueError, match=r"got shards \[.*\], expected at least one folder .* a name for each"):
            LatentDataModule(shards=none).check()
    with pytest.raises(ValueError, match=r"got shards \[''\]"):
        LatentDataModule(shards=shards, val_shards="").check()
    for name in ("frames", "height", "width"):
        with pytest.raises(ValueError, match=f"{name} -3"):
            VideoDataModule(shards=shards, **{name: -3})
    with pytest.raises(ValueError, match=r"batch_size 4 \(per rank\) and global_batch_size 8 \(all ranks\)"):
        LatentDataModule(shards=shards, batch_size=4, global_batch_size=8)
    for wrong in ({"global_batch_size": 0}, {"num_workers": -1}, {"prefetch_factor": 0}, {"max_fault_share": 2.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            LatentDataModule(shards=shards, **wrong)


def test_clips_for_a_vae(tmp_path):
    synth(tmp_path / "clips", clips=6, frames=7, size=64)
    pack(str(tmp_path / "clips"), tmp_path / "video", buckets=["7x64x64"], processes=1)
    data = VideoDataModule(
        shards=str(tmp_path / "video"), val_samples=2, batch_size=2, val_batch_size=2, frames=2, height=32, width=32
    )
    batches = list(data.train_dataloader())
    assert len(batches) == 2 and batches[0]["video"].shape == (2, 3, 2, 32, 32)
    assert sorted(key for batch in batches for key in batch["key"]) == [f"clip-{i:06d}" for i in range(4)]
    (held_out,) = data.val_dataloader()
    assert held_out["key"] == ["clip-000004", "clip-000005"] and held_out["uid"].tolist() == [4, 5]
