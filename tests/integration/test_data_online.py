"""Clips that are encoded in the step: the same batches as those of latents that were encoded beforehand."""

import hashlib
import json
import os
import shutil
import signal
import sys
import time

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from data.bucket import Bucket
from data.encode.command import encode
from data.modules.latents import LatentDataModule
from data.modules.online import EncodingDataModule
from data.shards.format import read_clip, read_samples
from data.storage.store import Store
from data.stream.clips import ClipReader
from data.stream.hold_out import everything
from data.synth.draw import render
from data.synth.scenes import choose_scene
from data.video.decode import decode_video
from data.video.write import write_video
from tests.support.clip_shards import TEXT_WIDTH, write_encoders, write_video_shards

STORE = Store()
SHORT, WIDE = Bucket(1, 32, 32), Bucket(7, 32, 48)
WINDOWS = {SHORT: [5], WIDE: [0, 2, 4, 6, 8, 10, 12]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Five clips of one bucket, seven of another."""
    folder, clips = tmp_path_factory.mktemp("clips"), []
    for number in range(12):
        scene = choose_scene(0, number)
        write_video(folder / "clip.mp4", render(scene, size=32, frames=13), 12)
        caption = "" if number == 3 else scene.caption
        clips.append((f"clip-{number:02d}", (folder / "clip.mp4").read_bytes(), caption.encode()))
    rows = {SHORT: clips[:5], WIDE: clips[5:]}
    laid = {bucket: [(*clip, WINDOWS[bucket]) for clip in rows] for bucket, rows in rows.items()}
    return write_video_shards(tmp_path_factory.mktemp("video"), laid, per_shard=3)


@pytest.fixture(scope="module")
def latents(shards, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    encode(str(shards), folder, base=base, batch_size=3)
    return folder


OPTIONS = {"val_samples": 4, "batch_size": 2, "sample_latents": True, "passes": 2}


def online(shards, base, **options):
    return EncodingDataModule(shards=str(shards), base=str(base), **{**OPTIONS, **options})


def same(found, expected):
    assert (found.uids, found.keys, found.counts) == (expected.uids, expected.keys, expected.counts)
    assert found.text_lengths == expected.text_lengths and torch.equal(found.text_mask, expected.text_mask)
    # What is stored is float16; clips encoded side by side may differ in its last place.
    torch.testing.assert_close(found.latents, expected.latents, atol=4e-3, rtol=4e-3)
    torch.testing.assert_close(found.text, expected.text, atol=2e-3, rtol=2e-3)


def test_windows_are_decoded_in_the_size_of_their_bucket(shards):
    clips = everything(ClipReader([str(shards)]))
    by_key = {clips[i].key: clips[i] for i in range(12)}
    assert tuple(by_key["clip-00"].video.shape) == (1, 32, 32, 3)
    assert tuple(by_key["clip-11"].video.shape) == (7, 32, 48, 3) and by_key["clip-03"].caption == ""
    for name, entry in (("clip-00", "1x32x32-000000.tar"), ("clip-11", "7x32x48-000002.tar")):
        bucket = Bucket.parse(entry.rpartition("-")[0])
        members = dict(read_samples(str(shards), entry, STORE))[name]
        whole = decode_video(read_clip(f"{shards}/{entry}", members, STORE), None, bucket.height, bucket.width)
        assert torch.equal(by_key[name].video, torch.from_numpy(whole[WINDOWS[bucket]]))


@pytest.mark.slow
def test_batches_are_those_of_clips_that_were_encoded_beforehand(shards, base, latents):
    one, other = online(shards, base), LatentDataModule(shards=str(latents), **OPTIONS)
    for step in ("train_dataloader", "val_dataloader"):
        found = [one.on_after_batch_transfer(batch, 0) for batch in getattr(one, step)()]
        expected = list(getattr(other, step)())
        assert len(found) == len(expected) > 1
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)
    assert (one.latent_shapes, one.text_width) == (other.latent_shapes, other.text_width)
    assert one.text_width == TEXT_WIDTH
    for mine, theirs in zip(one.probe_samples(2), other.probe_samples(2), strict=True):
        assert (mine.key, mine.uid) == (theirs.key, theirs.uid)
        torch.testing.assert_close(mine.latent, theirs.latent, atol=4e-3, rtol=4e-3)


class Recorder(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return (self.weight * batch.latents).mean() + (self.weight * batch.text).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.slow
def test_a_fit_trains_on_them_and_a_damaged_clip_costs_itself(shards, base, tmp_path):
    copy = tmp_path / "video"
    shutil.copytree(shards, copy)
    shard = copy / "7x32x48-000000.tar"
    content = bytearray(shard.read_bytes())
    start = content.index(b"clip-05.mp4") + 512
    content[start : start + 4000] = bytes(4000)
    shard.write_bytes(content)
    module = Recorder()
    Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_epochs=1,
        enable_model_summary=False, use_distributed_sampler=False, reload_dataloaders_every_n_epochs=1,
        default_root_dir=tmp_path / "run", limit_val_batches=0,
    ).fit(module, online(copy, base, passes=1, num_workers=1, max_fault_share=0.1))  # fmt: skip
    assert {tuple(batch.latents.shape) for batch in module.batches} == {(2, 12, 1, 4, 4), (2, 12, 2, 4, 6)}
    assert sum(batch.faults for batch in module.batches) == 1
    assert "clip-05" in (tmp_path / "run" / "faults.jsonl").read_text()
    assert all(torch.isfinite(batch.latents).all() and not batch.latents.is_inference() for batch in module.batches)


def spoil(monkeypatch, disaster):
    """The decoder meets a disaster in one clip."""

    def decode(content, indices, height, width):
        video = decode_video(content, indices, height, width)
        if digest(content) == bad:
            disaster()
        return video

    bad = None
    monkeypatch.setattr("data.stream.clips.decode_video", decode)

    def choose(shards, key):
        nonlocal bad
        members = dict(read_samples(str(shards), "7x32x48-000000.tar", STORE))[key]
        bad = digest(read_clip(f"{shards}/7x32x48-000000.tar", members, STORE))

    return choose


def digest(content):
    return hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(sys.platform != "linux", reason="decoders run in processes of their own on Linux only")
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("disaster", "reason"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "its process was killed"),
        (lambda: time.sleep(600), "took longer than 2 s"),
    ],
)
def test_a_decoder_that_hangs_or_crashes_costs_its_clip(shards, base, monkeypatch, tmp_path, workers, disaster, reason):
    spoil(monkeypatch, disaster)(shards, "clip-06")
    data = online(shards, base, passes=1, num_workers=workers, max_fault_share=0.1, deadline=2.0)
    data.check()
    data._faults.path = tmp_path / "faults.jsonl"
    batches = list(data.train_dataloader())
    assert sum(clip.faults for batch in batches for clip in batch.clips) == 1
    [fault] = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert fault["key"] == "clip-06" and reason in fault["reason"]


def test_what_cannot_be_is_refused_at_once(shards, base, latents, tmp_path):
    with pytest.raises(ValueError, match="got dtype 'int8'"):
        online(shards, base, dtype="int8")
    with pytest.raises(ValueError, match="expected 'reblock-videos-2'"):
        online(latents, base).check()
    with pytest.raises(ValueError, match=r"does not exist|lacks"):
        online(shards, tmp_path / "gone").check()
