"""Clips and captions encoded for each family besides Mochi, compared with diffusers' pipeline of that family."""

import json
import shutil

import pytest
import torch

from data.base_facts import read_base
from data.bucket import Bucket
from data.encode.command import encode
from data.families import VIDEO_FAMILIES, family_titled
from data.inspect.command import inspect
from data.modules.latents import LatentDataModule
from data.modules.online import EncodingDataModule
from data.shards.empty_caption import write_empty_caption
from data.stream.latents import LatentReader
from data.stream.reader import Visit
from data.video.decode import decode_video
from launch.fit.checks import check_family, check_fit
from tests.support.clip_shards import write_video_shards
from tests.support.encoded_shards import files
from tests.support.family_bases import COGVIDEOX_TOKENS, POOLED_WIDTH, TEXT_WIDTH, make_pipeline
from tests.support.tiny_families import make
from trainer.callbacks.probe_set import ProbeSet
from trainer.models.families import FAMILIES
from trainer.models.hunyuan_video import GUIDANCE
from trainer.module import RetrainBlocks, SurgeryConfig

#: Also right for Wan and HunyuanVideo, whose step is 4.
SIZE = (9, 32, 48)
INDICES = [0, 1, 2, 4, 5, 6, 8, 9, 10]
CAPTIONS = ["", "red disc &amp;  blue square", "a large green disc"]


@pytest.fixture(scope="module")
def three_clips(clips):
    return [(key, clip, caption.encode(), INDICES) for (key, clip, _), caption in zip(clips, CAPTIONS, strict=False)]


@pytest.fixture(scope="module", params=["wan", "cogvideox", "hunyuan_video"])
def encoded(request, three_clips, tmp_path_factory):
    """Family, pipeline, its folder, and the folder of latents that `reblock encode` wrote with it."""
    family, folder = request.param, tmp_path_factory.mktemp(request.param)
    pipeline = make_pipeline(family)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "base")
    # Video shards made for CogVideoX hold sizes that every family here takes.
    shards = write_video_shards(folder / "video", {Bucket(*SIZE, "cogvideox"): three_clips}, per_shard=3)
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "family": "cogvideox"}))
    encode(str(shards), folder / "latents", base=folder / "base", batch_size=2)
    return family, pipeline, folder


def read_samples(folder, **options):
    reader = LatentReader([str(folder / "latents")], **options)
    return [reader.try_load(0, row, Visit(row)) for row in range(3)]


def test_the_latent_is_what_the_vae_gives_normalised_as_the_pipeline_does(encoded, three_clips):
    family, pipeline, folder = encoded
    vae = pipeline.vae
    for sample, (_, clip, *_) in zip(read_samples(folder), three_clips, strict=True):
        pixels = torch.from_numpy(decode_video(clip, INDICES, *SIZE[1:])).permute(3, 0, 1, 2)[None] / 127.5 - 1
        with torch.no_grad():
            mean = vae.encode(pixels).latent_dist.mean[0]
        if family == "wan":
            shift, scale = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
            expected = (mean - shift[:, None, None, None]) / scale[:, None, None, None]
        else:
            expected = mean * vae.config.scaling_factor
        assert sample.latent.shape == (16, 3, 4, 6)
        torch.testing.assert_close(sample.latent, expected, atol=2e-3, rtol=2e-3)


@torch.no_grad()
def test_the_pipeline_decodes_latents_by_the_inverse_of_the_normalisation(encoded):
    family, pipeline, folder = encoded
    facts = read_base(folder / "base")
    how = {"prompt": "red disc", "height": SIZE[1], "width": SIZE[2], "num_frames": SIZE[0], "num_inference_steps": 1}
    if family == "cogvideox":
        how["max_sequence_length"] = COGVIDEOX_TOKENS
    latents, video = (
        pipeline(**how, generator=torch.Generator().manual_seed(1), output_type=kind).frames
        for kind in ("latent", "pt")
    )
    z = latents.transpose(1, 2) if family == "cogvideox" else latents
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (facts.mean, facts.std))
    decoded = pipeline.vae.decode(z * std + mean).sample
    expected = (decoded / 2 + 0.5).clamp(0, 1).transpose(1, 2)
    assert expected.std() > 1e-3
    torch.testing.assert_close(video, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_text_is_what_the_pipeline_gives_to_the_transformer(encoded):
    family, pipeline, folder = encoded
    lengths = []
    for sample, caption in zip(read_samples(folder), CAPTIONS, strict=True):
        text = sample.text
        lengths.append(len(text))
        if family == "wan":
            whole, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
            assert not whole[0, len(text) :].any() and len(text) >= 1  # SplitWan.embed pads with zeros
            expected = whole[0, : len(text)]
        elif family == "cogvideox":
            whole, _ = pipeline.encode_prompt(
                caption, do_classifier_free_guidance=False, max_sequence_length=COGVIDEOX_TOKENS
            )
            expected = whole[0]
        else:
            whole, pooled, mask = pipeline.encode_prompt(caption)
            expected = whole[0][mask[0].bool()]
            torch.testing.assert_close(sample.pooled, pooled[0], atol=1e-5, rtol=1e-5)
        assert expected.abs().sum() > 0
        torch.testing.assert_close(text, expected, atol=1e-5, rtol=1e-5)
        assert (sample.pooled is None) == (family != "hunyuan_video")
    assert lengths == [COGVIDEOX_TOKENS] * 3 if family == "cogvideox" else lengths[0] < lengths[2]


def test_the_index_names_the_family_and_batches_hold_what_it_needs(encoded):
    family, _, folder = encoded
    index = json.loads((folder / "latents" / "index.json").read_text())
    assert index["family"] == family and index["text_width"] == TEXT_WIDTH and index["channels"] == 16
    module = LatentDataModule(shards=str(folder / "latents"), val_samples=1, batch_size=2)
    module.check()
    assert module.family is VIDEO_FAMILIES[family] and module.latent_shapes == {"9x32x48": (16, 3, 4, 6)}
    assert module.probe_bucket == Bucket(*SIZE, family)
    batch = next(iter(module.train_dataloader()))
    if family == "hunyuan_video":
        assert module.pooled_width == POOLED_WIDTH and batch.pooled.shape == (2, POOLED_WIDTH)
    else:
        assert module.pooled_width is None and batch.pooled is None
    inspect(str(folder / "latents"), verify=True)


@torch.no_grad()
def test_a_dropped_caption_is_what_the_pipeline_makes_of_an_empty_prompt(encoded):
    """In training and in a probe without caption, and what the transformer makes of it."""
    family, pipeline, folder = encoded
    data = LatentDataModule(shards=str(folder / "latents"), val_samples=1, batch_size=2)
    module = RetrainBlocks(base=str(folder / "base"), surgery=SurgeryConfig(last=1, init="keep"), caption_dropout=1.0)
    check_fit(module, data)
    module.build("cpu")
    if family == "cogvideox":
        assert not (folder / "latents" / "empty_caption.safetensors").exists()
        assert "empty_caption" not in json.loads((folder / "latents" / "index.json").read_text())
        return
    module.empty_caption = data.empty_caption()
    online = EncodingDataModule(shards=str(folder / "video"), base=str(folder / "base"), val_samples=1).empty_caption()
    assert torch.equal(online.text, module.empty_caption.text)
    batch = module.drop_captions(next(iter(data.train_dataloader())), 0)
    probes = ProbeSet(data.probe_samples(1), (0.5,), seed=1, unconditional=True, empty=module.empty_caption)
    probe = next(probes.share(0, 1))[0].batch
    extra = {}
    if family == "wan":
        whole, _ = pipeline.encode_prompt("", do_classifier_free_guidance=False, max_sequence_length=512)
        text = whole[0]
    else:
        whole, pooled, mask = pipeline.encode_prompt("")
        text = whole[0][mask[0].bool()]
        assert batch.text_lengths == (len(text), len(text))
        for part in (batch, probe):
            torch.testing.assert_close(part.pooled, pooled.expand(len(part), -1), atol=1e-6, rtol=1e-5)
        extra = {"pooled_projections": pooled.expand(2, -1), "encoder_attention_mask": mask.expand(2, -1)}
        extra["guidance"] = torch.full((2,), 1000.0 * GUIDANCE)
    for part in (batch, probe):
        for embedding, length in zip(part.text, part.text_lengths, strict=True):
            assert length >= 1 and not text[length:].any()
            torch.testing.assert_close(embedding[:length], text[:length], atol=1e-6, rtol=1e-5)
    noise, sigma = torch.randn(batch.latents.shape), torch.tensor([0.3, 0.6])
    x, timestep = module.process.mix(batch.latents, noise, sigma), module.process.timestep(sigma)
    expected = pipeline.transformer(
        x, timestep=timestep, encoder_hidden_states=whole.expand(2, -1, -1), return_dict=False, **extra
    )[0]
    torch.testing.assert_close(module.velocity(x, sigma, batch), expected, atol=1e-4, rtol=1e-4)


def test_a_folder_without_its_empty_caption_gets_it_and_keeps_its_shards(encoded, tmp_path, capsys, monkeypatch):
    family, _, folder = encoded
    if family == "cogvideox":
        return
    old, name = shutil.copytree(folder / "latents", tmp_path / "old"), "empty_caption.safetensors"
    whole = (old / name).read_bytes()
    (old / name).unlink()
    index = json.loads((old / "index.json").read_text())
    del index["empty_caption"]
    (old / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="holds no encoded empty caption"):
        LatentDataModule(shards=str(old), val_samples=1).check_empty_caption()
    inspect(str(old), verify=True)
    assert "`reblock encode` adds it" in " ".join(capsys.readouterr().out.split())
    monkeypatch.setattr("data.encode.command.Encoders", None)  # the VAE is not needed
    stamps = {path: path.stat().st_mtime_ns for path in old.glob("*.tar")}

    def again():
        encode(str(folder / "video"), old, base=folder / "base", batch_size=2)
        assert files(old) == files(folder / "latents")

    again()
    for spoilt in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), None):  # cut; another number; absent
        (old / name).unlink()
        if spoilt is not None:
            (old / name).write_bytes(spoilt)
        with pytest.raises(ValueError, match=r"empty_caption\.safetensors"):
            LatentDataModule(shards=str(old), val_samples=1).check_empty_caption()
        with pytest.raises(ValueError, match="1 faults in"):
            inspect(str(old), verify=True)
        if spoilt is not None and len(spoilt) == len(whole):
            (old / name).unlink()  # as the message says
        again()
    (old / name).unlink()
    write_empty_caption(old, "other settings", torch.zeros(1, TEXT_WIDTH), None)  # left by a run that was given up
    again()
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_shards_of_another_family_or_without_a_pooled_embedding_are_refused(encoded, tmp_path):
    family, _, folder = encoded
    other = shutil.copytree(folder / "latents", tmp_path / "other")
    index = json.loads((other / "index.json").read_text())
    (other / "index.json").write_text(json.dumps({**index, "family": "hunyuan_video", "pooled_width": None}))
    with pytest.raises(ValueError, match="lacks 'pooled_width': its captions have no pooled embedding, which Hunyuan"):
        LatentDataModule(shards=str(other), val_samples=1).check()
    named = "wan" if family == "cogvideox" else "cogvideox"
    (other / "index.json").write_text(json.dumps({**index, "family": named}))
    with pytest.raises(ValueError, match=r"has family .*latent shards that are trained on together must agree"):
        LatentDataModule(shards=[str(folder / "latents"), str(other)], val_samples=1).check()
    (other / "index.json").write_text(json.dumps({**index, "family": "later"}))
    with pytest.raises(ValueError, match="got family 'later', expected one of mochi, wan"):
        LatentDataModule(shards=str(other), val_samples=1).check()


def test_what_a_family_does_not_take_is_refused_before_anything_is_written(encoded, shards, tmp_path):
    family, _, folder = encoded
    title = VIDEO_FAMILIES[family].title
    with pytest.raises(ValueError, match=rf"clips of 7x32x32 for Mochi, which {title} does not take: .* for {title}"):
        encode(str(shards), tmp_path / "out", base=folder / "base")
    with pytest.raises(ValueError, match="got max_text_tokens 513, expected"):
        encode(str(folder / "video"), tmp_path / "out", base=folder / "base", max_text_tokens=513)
    base = shutil.copytree(folder / "base", tmp_path / "base")
    model_index = json.loads((base / "model_index.json").read_text())
    for change in ({"_class_name": "AnotherPipeline"}, *([{"boundary_ratio": 0.9}] * (family == "wan"))):
        (base / "model_index.json").write_text(json.dumps(model_index | change))
        with pytest.raises(ValueError, match=r"AnotherPipeline|Wan 2\.2, which is not supported"):
            encode(str(folder / "video"), tmp_path / "out", base=base)
    (base / "model_index.json").write_text(json.dumps(model_index))
    config = base / "vae" / "config.json"
    fields = json.loads(config.read_text())
    spoilt = {
        "wan": {"latents_std": [1.0]}, "cogvideox": {"invert_scale_latents": True}, "hunyuan_video": {"shift_factor": 1}
    }  # fmt: skip
    config.write_text(json.dumps(fields | spoilt[family]))
    with pytest.raises(ValueError, match=r"values for 16 latent channels|CogVideoX 1\.5|expected a number above 0"):
        encode(str(folder / "video"), tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists() and files(folder / "latents")


def test_a_fit_takes_latents_of_its_own_family_only(encoded):
    family, _, folder = encoded
    data = LatentDataModule(shards=str(folder / "latents"), val_samples=1)
    data.check()
    check_family(str(folder / "base"), data)
    data.pooled_width = 5
    with pytest.raises(ValueError, match="got pooled captions of width 5, expected"):
        check_family(str(folder / "base"), data)
    data.family = VIDEO_FAMILIES["mochi"]
    with pytest.raises(ValueError, match=f"got latents of Mochi for a base of {VIDEO_FAMILIES[family].title}"):
        check_family(str(folder / "base"), data)


def test_titles_are_those_of_the_transformers():
    assert [family.title for family in VIDEO_FAMILIES.values()] == [split.family for split in FAMILIES.values()]
    for name in ("mochi", "wan", "hunyuan", "cogvideox-5b"):
        model = make(name)
        facts = FAMILIES[type(model).__name__].facts(model.config)
        assert family_titled(facts.family).encodes_empty == (facts.empty_caption == "encoded")
