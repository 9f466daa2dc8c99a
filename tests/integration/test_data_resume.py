"""A fit that is stopped goes on with exactly the batch after the last one, and loads none of those before."""

import random
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save

from data.datamodule import LatentDataModule, VideoDataModule
from data.pack import pack
from data.resume import Split
from data.shards import LATENT_FORMAT, ShardFolder
from data.stream import LatentDataset
from data.synth import synth

BATCHES, EPOCHS = 7, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Latent shards of 32 samples: 28 for training, 4 held out."""
    path = tmp_path_factory.mktemp("latents")
    folder = ShardFolder(path, {})
    names = []
    for number in range(4):
        samples = []
        for i in range(8 * number, 8 * number + 8):
            latent = torch.full((2, 1, 2, 2), float(i)).half()
            content = save({"mean": latent, "logvar": -latent, "text": torch.ones(i % 3, 8)})
            samples.append({"__key__": f"clip-{i:02d}", "safetensors": content})
        names.append(f"shard-{number}.tar")
        folder.write(names[-1], samples, [])
    facts = {"latents_mean": [0.0, 0.0], "latents_std": [1.0, 1.0], "latent_shape": [2, 1, 2, 2], "text_width": 8}
    folder.finish(names, {"format": LATENT_FORMAT, **facts})
    return str(path)


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


def fit(shards, *, workers=0, checkpoint=None, callbacks=(), data=None, **trainer):
    settings = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "max_epochs": EPOCHS,
    }  # fmt: skip
    module = Recorder()
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
    with pytest.raises(ValueError, match="got 5 probe samples, expected 1 to 4"):
        data.probe_samples(5)
    apart = LatentDataModule(shards=shards, val_shards=shards, val_samples=5)
    assert [s.key for s in apart.probe_samples(5)] == [f"clip-{i:02d}" for i in range(5)]
    assert len(apart.train_split) == 32


def test_a_damaged_training_sample_is_never_replaced_by_a_held_out_one(shards, monkeypatch):
    original = LatentDataset.load

    def damaged(self, shard, key, members, uid):
        if key == "clip-27":
            raise ValueError("damaged")
        return original(self, shard, key, members, uid)

    monkeypatch.setattr(LatentDataset, "load", damaged)
    data = LatentDataModule(shards=shards, val_samples=4)
    assert (data.train_split[27].key, data.train_split[27].uid) == ("clip-00", 27)


def test_faults_of_a_data_module(shards, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        LatentDataModule(shards=str(tmp_path / "none")).check()
    with pytest.raises(ValueError, match="got val_samples 32 held out of 32"):
        LatentDataModule(shards=shards, val_samples=32).check()
    with pytest.raises(ValueError, match="global batch of 29 x 1 ranks"):
        LatentDataModule(shards=shards, val_samples=4, batch_size=29).train_dataloader()
    with pytest.raises(ValueError, match="expected at least 1 of each"):
        LatentDataModule(shards=shards, batch_size=0)
    with pytest.raises(ValueError, match="at least one folder"):
        LatentDataModule(shards=[]).check()


def test_clips_for_a_vae(tmp_path):
    synth(tmp_path / "clips", clips=6, frames=3, size=64)
    pack(tmp_path / "clips", tmp_path / "video", frames=3)
    data = VideoDataModule(
        shards=str(tmp_path / "video"), val_samples=2, batch_size=2, val_batch_size=2, frames=2, height=32, width=32
    )
    batches = list(data.train_dataloader())
    assert len(batches) == 2 and batches[0]["video"].shape == (2, 3, 2, 32, 32)
    assert sorted(key for batch in batches for key in batch["key"]) == [f"clip-{i:06d}" for i in range(4)]
    (held_out,) = data.val_dataloader()
    assert held_out["key"] == ["clip-000004", "clip-000005"] and held_out["uid"].tolist() == [4, 5]
