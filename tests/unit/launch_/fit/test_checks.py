"""Shards of another family or another encoder than the base's are refused, in words that name the family."""

import json
import warnings

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLMochi, AutoencoderKLWan

from data.base_facts import read_base
from data.modules.latents import LatentDataModule
from launch.fit.checks import check_fit
from tests.support.family_bases import make_pipeline
from tests.support.latent_shards import write_latents
from tests.support.tiny_families import TINY, make
from trainer.models.families import FAMILIES
from trainer.module import RetrainBlocks, SurgeryConfig

#: Name of a tiny model -> its name in shards, a bucket, a VAE of its family, and fields of that VAE's config by which
#: latents are normalised as `write_latents` says: mean 0, deviation 1.
FAMILY = {
    "mochi": ("mochi", "7x32x32", AutoencoderKLMochi, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
    "wan": ("wan", "5x32x32", AutoencoderKLWan, {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}),
    "hunyuan": ("hunyuan_video", "5x32x32", AutoencoderKLHunyuanVideo, {"scaling_factor": 1.0}),
    "cogvideox-2b": ("cogvideox", "9x32x32", AutoencoderKLCogVideoX, {"scaling_factor": 1.0}),
    "cogvideox-5b": ("cogvideox", "9x32x32", AutoencoderKLCogVideoX, {"scaling_factor": 1.0}),
}
FIELDS = {
    "mochi": "latent_channels",
    "wan": "z_dim",
    "hunyuan_video": "latent_channels",
    "cogvideox": "latent_channels",
}


@pytest.fixture(params=sorted(FAMILY))
def name(request):
    return request.param


@pytest.fixture
def base(name, tmp_path):
    """A base with a transformer and the config of a VAE."""
    make(name).save_pretrained(tmp_path / "base" / "transformer")
    write_vae(tmp_path / "base", name)
    return tmp_path / "base"


def write_vae(base, name, **fields):
    _, _, vae, own = FAMILY[name]
    config = {"_class_name": vae.__name__, "z_dim" if name == "wan" else "latent_channels": 4, **own, **fields}
    (base / "vae").mkdir(exist_ok=True)
    (base / "vae" / "config.json").write_text(json.dumps(config))


def check(base, folder, name, width=16, pooled=8, **head):
    """`check_fit` of shards for the family of `name`."""
    family, bucket, *_ = FAMILY[name]
    shards = write_latents(
        folder, [(bucket, 20)], channels=4, width=width, family=family, text=lambda i: torch.zeros(5, width),
        pooled=(lambda i: torch.zeros(pooled)) if name == "hunyuan" else None, **head,
    )  # fmt: skip
    data = LatentDataModule(shards=shards, val_samples=1)
    module = RetrainBlocks(base=str(base), surgery=SurgeryConfig(last=1), caption_dropout=0.0)
    check_fit(module, data, ranks=1)


def title(name):
    return FAMILIES[TINY[name][0].__name__].family


def test_shards_that_the_base_has_encoded_are_taken(base, name, tmp_path):
    check(base, tmp_path / "own", name)


def test_text_of_another_encoder_is_refused(base, name, tmp_path):
    with pytest.raises(ValueError, match=rf"captions 24 wide, the base .* of {title(name)} takes 16; .*reblock encode"):
        check(base, tmp_path / "wide", name, width=24)
    if name == "hunyuan":
        with pytest.raises(ValueError, match=r"pooled captions of width 5, expected 8 .* of HunyuanVideo takes"):
            check(base, tmp_path / "pooled", name, pooled=5)


def test_shards_of_another_family_are_refused(base, name, tmp_path):
    for other in ("mochi", "wan", "hunyuan", "cogvideox-5b"):
        if title(other) != title(name):
            said = rf"got latents of {title(other)} for a base of {title(name)}"
            with pytest.raises(ValueError, match=said):
                check(base, tmp_path / other, other)


def test_latents_of_another_vae_are_refused(base, name, tmp_path):
    if "scaling_factor" in FAMILY[name][3]:
        write_vae(base, name, scaling_factor=0.7)
        said = r"deviation 1 \(scaling factor 1\), expected mean 0 and deviation 1\.42857 \(scaling factor 0\.7\)"
        channel = 0
    else:
        write_vae(base, name, latents_mean=[0.0, 0.5, 0.0, 0.0])
        said, channel = r"mean 0 and deviation 1 .*, expected mean 0\.5 and deviation 1\.", 1
    with pytest.raises(ValueError, match=rf"latents of {title(name)} of another VAE .*: channel {channel} .*{said}"):
        check(base, tmp_path / "other", name)
    (base / "vae" / "config.json").unlink()  # a base of the transformer alone: nothing to compare with
    check(base, tmp_path / "alone", name)


def test_captions_of_other_encoders_are_named(tmp_path):
    """Another class of text encoder is refused; other weights than those that made the shards are a warning."""
    base = tmp_path / "base"
    make_pipeline("wan").save_pretrained(base)
    facts = read_base(base)
    shards = write_latents(
        tmp_path / "latents", [("5x32x32", 20)], channels=16, width=16, family="wan",
        text=lambda i: torch.zeros(5, 16), latents_mean=facts.mean, latents_std=facts.std,
    )  # fmt: skip
    index = tmp_path / "latents" / "index.json"

    def check_with(fingerprint):
        index.write_text(json.dumps(json.loads(index.read_text()) | {"settings": {"base": fingerprint}}))
        data = LatentDataModule(shards=shards, val_samples=1)
        check_fit(RetrainBlocks(base=str(base), surgery=SurgeryConfig(last=1), caption_dropout=0.0), data, ranks=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_with(facts.fingerprint)
    with pytest.warns(UserWarning, match="captions of Wan 2.1 from other encoder files than those of base"):
        check_with("of another base")
    config = base / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["T5EncoderModel"]}))
    with pytest.raises(ValueError, match="describes 'T5EncoderModel', expected 'UMT5EncoderModel'"):
        check_with(facts.fingerprint)
