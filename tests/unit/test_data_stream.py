"""Latents read out of archives: normalised, drawn, damaged, mixed."""

import json
import logging

import pytest
import torch
from safetensors.torch import save

from data.pack import pack
from data.shards import LATENT_FORMAT, VIDEO_FORMAT, ShardFolder
from data.stream import LatentDataset, VideoDataset
from data.synth import synth
from data.video import decode_video

SHAPE = (3, 2, 4, 4)
MEAN, STD = [0.5, -1.0, 0.0], [2.0, 0.5, 1.0]


def raw_latent(i):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)).half()


def write_latents(folder, sizes=(3, 2), shape=SHAPE, spoil=(), **head):
    """Shards of raw latents with log-variance i; sample i has i text tokens. Those in `spoil` are no safetensors."""
    shards, made, names = ShardFolder(folder, {}), 0, []
    for number, size in enumerate(sizes):
        samples = []
        for i in range(made, made + size):
            latent = raw_latent(i).reshape(shape) if shape != SHAPE else raw_latent(i)
            text = torch.full((i, 8), float(i))
            tensors = {"mean": latent, "logvar": torch.full(shape, float(i)).half(), "text": text}
            content = b"damaged" if i in spoil else save(tensors)
            samples.append({"__key__": f"clip-{i}", "safetensors": content, "json": "{}"})
        names.append(f"shard-{number:06d}.tar")
        shards.write(names[-1], samples, [])
        made += size
    facts = {"latents_mean": MEAN, "latents_std": STD, "latent_shape": list(shape), "text_width": 8}
    shards.finish(names, {"format": LATENT_FORMAT, **facts, **head})
    return folder


def test_latents_are_normalised_per_channel_and_captions_have_their_length(tmp_path):
    dataset = LatentDataset([write_latents(tmp_path)])
    assert len(dataset) == 5 and dataset.latent_shape == SHAPE and dataset.text_width == 8
    for i in range(5):
        sample = dataset[i]
        expected = (raw_latent(i).float() - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
        assert torch.equal(sample.latent, expected) and sample.latent.dtype == torch.float32
        assert torch.equal(sample.text, torch.full((i, 8), float(i)))
        assert (sample.key, sample.uid) == (f"clip-{i}", i)


def test_several_folders_follow_one_another(tmp_path):
    dataset = LatentDataset([write_latents(tmp_path / "a"), write_latents(tmp_path / "b", sizes=(4,))])
    assert [dataset[i].key for i in range(9)] == [f"clip-{i}" for i in (0, 1, 2, 3, 4, 0, 1, 2, 3)]
    assert dataset.shard_sizes == [3, 2, 4]
    with pytest.raises(IndexError):
        dataset[9]


def test_drawing_from_the_posterior_is_keyed_by_uid_and_has_its_width(tmp_path):
    folder = write_latents(tmp_path)
    dataset, mean = LatentDataset([folder], sample_latents=True), LatentDataset([folder])
    everything = range(5)
    first = dataset.get(2, uid=2, among=everything).latent
    assert torch.equal(first, dataset.get(2, uid=2, among=everything).latent)
    assert not torch.equal(first, dataset.get(2, uid=7, among=everything).latent)
    std = torch.tensor(STD).view(3, 1, 1, 1)
    draws = torch.stack([dataset.get(2, uid=uid, among=everything).latent for uid in range(300)])
    noise = (draws - mean[2].latent) * std
    assert abs(noise.std().item() / torch.tensor(2.0).mul(0.5).exp().item() - 1) < 0.03  # logvar of sample 2 is 2
    assert abs(noise.mean().item()) < 0.1


def test_a_damaged_sample_is_named_and_its_successor_in_the_split_takes_its_place(tmp_path, caplog):
    folder = write_latents(tmp_path, spoil=(2, 4))
    dataset = LatentDataset([folder], max_fault_share=0.5)
    with caplog.at_level(logging.WARNING):
        taken = dataset.get(2, uid=2, among=range(4))
    assert (taken.key, taken.uid) == ("clip-3", 2)
    assert "sample 2 is damaged" in caplog.text
    assert dataset.get(4, uid=9, among=range(3, 5)).key == "clip-3"  # never from another split


def test_past_a_share_of_damaged_samples_reading_stops(tmp_path):
    dataset = LatentDataset([write_latents(tmp_path, spoil=(1, 3))])
    assert dataset[1].key == "clip-2"  # one is always let pass
    with pytest.raises(ValueError, match=r"2 of 5 samples are damaged.*max_fault_share 0.01"):
        dataset[3]


def test_a_latent_that_is_not_finite_or_of_another_shape_is_damaged(tmp_path):
    folder = write_latents(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "latent_shape": [3, 2, 4, 5]}))
    with pytest.raises(ValueError, match=r"2 of 5 samples.*has latent \(3, 2, 4, 4\).*expected \(3, 2, 4, 5\)"):
        LatentDataset([folder])[0]
    (folder / "index.json").write_text(json.dumps({**index, "latents_std": [1.0, 0.0, 1.0]}))
    with pytest.raises(ValueError, match="not finite"):
        LatentDataset([folder])[0]


@pytest.mark.parametrize("head", [{"text_width": 16}, {"latents_mean": [0.0, 0.0, 0.0]}])
def test_folders_that_differ_are_refused(tmp_path, head):
    folders = [write_latents(tmp_path / "a"), write_latents(tmp_path / "b", **head)]
    with pytest.raises(ValueError, match=f"has {next(iter(head))} .*must agree"):
        LatentDataset(folders)


def test_truncated_shards_are_damaged_samples(tmp_path):
    folder = write_latents(tmp_path, sizes=(3, 2))
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:900])
    dataset = LatentDataset([folder], max_fault_share=0.5)
    assert [dataset[i].key for i in range(5)] == ["clip-0", "clip-1", "clip-2", "clip-0", "clip-0"]


def test_clips_are_decoded_to_minus_one_to_one(tmp_path):
    synth(tmp_path / "clips", clips=2, frames=3, size=32)
    pack(tmp_path / "clips", tmp_path / "out", frames=3)
    sample = VideoDataset([tmp_path / "out"], frames=2, height=32, width=32)[1]
    pixels = decode_video(tmp_path / "clips" / "clip-000001.mp4", 2)
    assert sample["video"].shape == (3, 2, 32, 32) and sample["video"].dtype == torch.float32
    expected = torch.from_numpy(pixels).permute(3, 0, 1, 2).float() / 127.5 - 1
    torch.testing.assert_close(sample["video"], expected)
    assert sample["video"].min() >= -1 and sample["video"].max() <= 1
    assert sample["caption"] == (tmp_path / "clips" / "clip-000001.txt").read_text().strip()
    with pytest.raises(ValueError, match=f"has format '{VIDEO_FORMAT}'"):
        LatentDataset([tmp_path / "out"])
