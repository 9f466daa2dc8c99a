"""Data modules in a fit: what is held out, what damage costs, what is refused."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from data.modules.latents import LatentDataModule
from data.modules.videos import VideoDataModule
from data.pack.command import pack
from data.synth.command import synth
from tests.support.fits import every_step, fit
from tests.support.latent_shards import write_latents


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Latent shards of 32 samples: 28 for training, 4 held out."""
    return write_latents(tmp_path_factory.mktemp("latents"), [("1x16x16", 8)] * 4)


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
