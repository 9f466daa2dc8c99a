"""From clips on disk to normalised latents, through the classes that the real base has."""

import json

import pytest
import torch
from diffusers import AutoencoderKLMochi, MochiPipeline
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from data.base import check_size, read_base
from data.datamodule import LatentDataModule
from data.encode import encode
from data.inspect import inspect
from data.pack import pack
from data.shards import list_samples, read_member
from data.stream import LatentDataset
from data.synth import CAPTION_WORDS, synth
from data.video import decode_video

FRAMES, SIDE, WIDTH = 7, 32, 16
SIZE = {"frames": FRAMES, "height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder with tiny encoders of the real classes."""
    folder = tmp_path_factory.mktemp("base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
            add_attention_block=(False,) * 5,
        )
        vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
        vocabulary += [(f"▁{word}", -2.0) for word in CAPTION_WORDS] + [(letter, -6.0) for letter in "abcdefgh,"]
        config = T5Config(vocab_size=len(vocabulary), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        T5EncoderModel(config).save_pretrained(folder / "text_encoder")
    vae.save_pretrained(folder / "vae")
    T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64).save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    synth(folder, clips=5, frames=FRAMES, size=SIDE)
    (folder / "clip-000003.txt").write_text("\n")
    return folder


@pytest.fixture(scope="module")
def shards(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    pack(clips, folder, frames=FRAMES, samples_per_shard=3)
    return folder


@pytest.fixture(scope="module")
def latents(shards, base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    encode(shards, folder, base=base, **SIZE, batch_size=2)
    return folder


def test_latents_are_what_the_vae_gives_normalised_with_its_own_statistics(latents, clips, base):
    vae = AutoencoderKLMochi.from_pretrained(base / "vae")
    mean, std = (torch.tensor(vae.config[name]).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    dataset = LatentDataset([latents])
    assert dataset.latent_shape == (12, 2, 4, 4) and len(dataset) == 5
    for sample in (dataset[i] for i in range(5)):
        video = torch.from_numpy(decode_video(clips / f"{sample.key}.mp4")).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            raw = vae.encode(video).latent_dist.mean[0]
        torch.testing.assert_close(sample.latent, (raw - mean) / std, atol=2e-3, rtol=2e-3)  # kept in float16


def test_text_is_what_the_pipeline_gives_on_its_valid_tokens(latents, clips, base):
    encoder = T5EncoderModel.from_pretrained(base / "text_encoder")
    tokenizer = T5Tokenizer.from_pretrained(base / "tokenizer")
    pipeline = MochiPipeline(scheduler=None, vae=None, text_encoder=encoder, tokenizer=tokenizer, transformer=None)
    dataset = LatentDataset([latents])
    for sample in (dataset[i] for i in range(5)):
        caption = (clips / f"{sample.key}.txt").read_text().strip()
        if not caption:
            assert sample.text.shape == (0, WIDTH)
            continue
        with torch.no_grad():
            embeds, mask = pipeline._get_t5_prompt_embeds(caption, max_sequence_length=64, device="cpu")
        torch.testing.assert_close(sample.text, embeds[0][mask[0]], atol=1e-5, rtol=1e-5)
        assert len(sample.text) > len(caption.split())  # words and the end


def test_members_and_index(latents, clips):
    index = json.loads((latents / "index.json").read_text())
    assert index["format"] == "reblock-latents-1" and index["text_width"] == WIDTH
    assert [(s["name"], s["samples"]) for s in index["shards"]] == [("shard-000000.tar", 3), ("shard-000001.tar", 2)]
    shard = latents / "shard-000000.tar"
    members = list_samples(shard)["clip-000001"]
    assert set(members) == {"safetensors", "json"}
    facts = json.loads(read_member(shard, members["json"]))
    assert facts == {**SIZE, "caption": (clips / "clip-000001.txt").read_text().strip(), "source": "clip-000001"}


def test_parts_give_the_same_shards_and_the_last_writes_the_index(latents, shards, base, tmp_path):
    encode(shards, tmp_path, base=base, **SIZE, batch_size=2, part=1, parts=2)
    assert not (tmp_path / "index.json").exists()
    encode(shards, tmp_path, base=base, **SIZE, batch_size=2, part=0, parts=2)
    assert json.loads((tmp_path / "index.json").read_text()) == json.loads((latents / "index.json").read_text())


def test_finished_shards_are_kept_and_missing_ones_made_again(shards, base, tmp_path, capsys):
    encode(shards, tmp_path, base=base, **SIZE)
    before = (tmp_path / "shard-000001.tar").read_bytes()
    stamp = (tmp_path / "shard-000000.tar").stat().st_mtime_ns
    (tmp_path / "shard-000001.tar").unlink()
    capsys.readouterr()
    encode(shards, tmp_path, base=base, **SIZE)
    assert "1 of 2 shards are finished already" in capsys.readouterr().out
    assert (tmp_path / "shard-000001.tar").read_bytes() == before
    assert (tmp_path / "shard-000000.tar").stat().st_mtime_ns == stamp


def test_other_settings_or_another_base_are_refused(latents, shards, base, tmp_path):
    with pytest.raises(ValueError, match=r"other settings .*'height': \(32, 16\)"):
        encode(shards, latents, base=base, frames=FRAMES, height=16, width=SIDE)
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / "base" / part).mkdir(parents=True)
        for path in (base / part).iterdir():
            (tmp_path / "base" / part / path.name).write_bytes(path.read_bytes())
    weights = tmp_path / "base" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(ValueError, match=r"other settings .*'base'"):
        encode(shards, latents, base=tmp_path / "base", **SIZE)


def test_a_clip_that_cannot_be_decoded_costs_that_clip_only(clips, base, tmp_path):
    spoiled = tmp_path / "clips"
    spoiled.mkdir()
    for path in clips.glob("clip-*"):
        (spoiled / path.name).write_bytes(path.read_bytes())
    clip = spoiled / "clip-000001.mp4"
    clip.write_bytes(clip.read_bytes()[:-20])  # begins well, so that packing takes it
    pack(spoiled, tmp_path / "video", frames=FRAMES)
    with pytest.raises(ValueError, match=r"1 of 5 items .*clip-000001"):
        encode(tmp_path / "video", tmp_path / "strict", base=base, **SIZE)
    encode(tmp_path / "video", tmp_path / "out", base=base, **SIZE, max_fault_share=0.3)
    dataset = LatentDataset([tmp_path / "out"])
    assert [dataset[i].key for i in range(4)] == [f"clip-{i:06d}" for i in (0, 2, 3, 4)]
    assert json.loads((tmp_path / "out" / "faults.jsonl").read_text())["key"] == "clip-000001"


def test_faults_are_found_before_anything_is_loaded(shards, base, tmp_path, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoencoderKLMochi, "from_pretrained", loaded)
    with pytest.raises(ValueError, match=r"got frames 20, expected 6 k \+ 1, for example 19 or 25"):
        encode(shards, tmp_path / "out", base=base, frames=20)
    with pytest.raises(ValueError, match=r"got height 40.*; got width 8"):
        encode(shards, tmp_path / "out", base=base, height=40, width=8)
    with pytest.raises(ValueError, match="got dtype 'int8'"):
        encode(shards, tmp_path / "out", base=base, **SIZE, dtype="int8")
    with pytest.raises(ValueError, match=r"lacks vae/config\.json"):
        encode(shards, tmp_path / "out", base=tmp_path, **SIZE)
    with pytest.raises(ValueError, match="does not exist"):
        encode(tmp_path / "none", tmp_path / "out", base=base, **SIZE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"_class_name": "AutoencoderKLWan"}, "describes 'AutoencoderKLWan', expected 'AutoencoderKLMochi'"),
        ({"temporal_expansions": [1, 2, 2]}, r"by \(4, 8\), expected Mochi's \(6, 8\)"),
        ({"latents_mean": [0.0]}, "has {'latents_mean': 1, 'latents_std': 12} values"),
    ],
)
def test_a_base_that_is_not_mochis(base, tmp_path, change, message):
    for part in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / part).mkdir()
        for path in (base / part).glob("*.json"):
            (tmp_path / part / path.name).write_bytes(path.read_bytes())
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_base(tmp_path)


@pytest.mark.parametrize("frames", [1, 7, 163])
def test_sizes_that_fit(frames):
    check_size(frames, 480, 848)


def test_the_data_module_and_inspect_read_them(latents, shards, tmp_path, capsys):
    data = LatentDataModule(shards=str(latents), val_samples=2, batch_size=3)
    data.check()
    assert (data.latent_shape, data.text_width) == ((12, 2, 4, 4), WIDTH)
    (batch,) = data.train_dataloader()
    assert batch.latents.shape == (3, 12, 2, 4, 4) and sorted(batch.uids) == [0, 1, 2]
    assert [s.key for s in data.probe_samples(2)] == ["clip-000003", "clip-000004"]
    inspect(latents, verify=True)
    printed = capsys.readouterr().out
    assert "(12, 2, 4, 4)" in printed and "verified: 2 checksums, 5 samples" in printed and "channel 11" in printed
    inspect(shards, verify=True, contact_sheet=tmp_path / "sheet.png")
    printed = capsys.readouterr().out
    assert "32x32: 5" in printed and "7 / 7 / 7" in printed
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="holds latents, expected video shards"):
        inspect(latents, contact_sheet=tmp_path / "other.png")


def test_verify_names_what_is_damaged(latents, tmp_path, capsys):
    for path in latents.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "shard-000000.tar"
    member = list_samples(shard)["clip-000002"]["safetensors"]
    content = bytearray(shard.read_bytes())
    content[member.offset : member.offset + 8] = b"\xff" * 8  # the length of the header
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="2 faults in"):
        inspect(tmp_path, verify=True)
    printed = capsys.readouterr().out.replace("\n", "")
    assert "its checksum differs from the index" in printed and "clip-000002" in printed
