"""Layered scenes as latent shards: the same whoever makes them, and what the encoders of the base give."""

import json

import pytest
import torch
from safetensors.torch import load

from data.encode.encoders import Encoders
from data.shards.format import read_member, read_samples
from data.storage.store import Store
from data.synth.latents import synth_latents
from data.synth.layered import choose_layered_scene
from data.synth.layered_draw import render_layered

BASE = "recipes/demo_base"
SMALL = {"base": BASE, "clips": 5, "seed": 3, "size": 32, "frames": 7, "shard_samples": 2, "batch_size": 2}


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("latents") / "whole"
    synth_latents(out, **SMALL)
    return out


def test_shards_hold_the_latents_and_captions_of_their_scenes(whole):
    index = json.loads((whole / "index.json").read_text())
    assert index["samples"] == 5 and [shard["samples"] for shard in index["shards"]] == [2, 2, 1]
    encoders = Encoders(BASE, "cpu", torch.float32, 256)
    for shard, first in zip(index["shards"], (0, 2, 4), strict=True):
        samples = read_samples(str(whole), shard["name"], Store())
        scenes = [choose_layered_scene(3, first + row) for row in range(len(samples))]
        means, _ = encoders.latents(render_layered(scenes, size=32, frames=7))
        for (key, members), scene, mean in zip(samples, scenes, means, strict=True):
            read = {name: read_member(str(whole / shard["name"]), member, Store()) for name, member in members.items()}
            assert json.loads(read["json"])["caption"] == scene.caption, key
            assert torch.equal(load(read["safetensors"])["mean"], mean)
            assert torch.equal(load(read["text"])["text"], encoders.text([scene.caption])[0])


def test_parts_give_the_same_files_as_one_process_and_the_last_writes_the_index(whole, tmp_path, capsys):
    out = tmp_path / "parts"
    synth_latents(out, **SMALL, part=1, parts=2)
    assert not (out / "index.json").exists() and "other parts are not finished" in capsys.readouterr().out
    synth_latents(out, **SMALL, part=0, parts=2)
    assert files(out) == files(whole)


def test_finished_shards_are_kept_and_more_clips_add_to_them(whole, tmp_path):
    out = tmp_path / "more"
    synth_latents(out, **SMALL | {"clips": 2})
    first = next(out.glob("*.tar"))
    stamp = first.stat().st_mtime_ns
    synth_latents(out, **SMALL | {"clips": 4})
    assert first.stat().st_mtime_ns == stamp
    assert first.read_bytes() == (whole / first.name).read_bytes()
    with pytest.raises(ValueError, match="other settings"):
        synth_latents(out, **SMALL | {"seed": 4})


@pytest.mark.parametrize("wrong", [{"clips": 0}, {"part": 2, "parts": 2}, {"dtype": "int8"}, {"frames": 8}])
def test_settings_that_do_not_fit_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match="expected"):
        synth_latents(tmp_path / "out", **SMALL | wrong)
    assert not (tmp_path / "out").exists()
