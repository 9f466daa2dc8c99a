"""Encoding where something is wrong: damaged samples, truncated shards, invalid settings and folders."""

import json
import os
import shutil

import pytest
from diffusers import AutoencoderKLMochi

from data.encode.command import encode
from data.shards.format import read_samples
from tests.support.clip_shards import write_video_shards
from tests.support.encoded_shards import (
    FIRST,
    SECOND,
    STORE,
    TALL,
    THIRD,
    WIDE,
    faults_of,
    files,
    lay_out,
    read_all,
)


@pytest.fixture(scope="module")
def spoiled(clips, tmp_path_factory):
    """Shards in which three of seven samples are damaged."""
    rows = lay_out(clips)
    key, clip, caption, indices = rows[TALL][1]
    rows[TALL][1] = (key, clip[: len(clip) // 3], caption, indices)
    key, clip, caption, indices = rows[TALL][3]
    rows[TALL][3] = (key, clip, b"\xff\xfe" + caption, indices)
    key, clip, caption, indices = rows[WIDE][0]
    rows[WIDE][0] = (key, clip, caption, indices[:-1])
    return write_video_shards(tmp_path_factory.mktemp("spoiled"), rows, per_shard=3)


def test_a_damaged_sample_costs_that_sample_and_is_named(spoiled, base, tmp_path):
    encode(str(spoiled), tmp_path, base=base, batch_size=2, max_fault_share=0.5)
    assert list(read_all(tmp_path)) == ["clip-0", "clip-2", "clip-4", "clip-6"]
    found = faults_of(tmp_path)
    assert [(f["shard"], f["key"]) for f in found] == [(FIRST, "clip-1"), (SECOND, "clip-3"), (THIRD, "clip-5")]
    assert "caption is not UTF-8" in found[1]["reason"] and "expected 7 numbers of frames" in found[2]["reason"]
    assert json.loads((tmp_path / "index.json").read_text())["faults"] == 3


def test_too_many_faults_stop_the_run_before_the_shard_that_exceeds_the_share_is_finished(
    spoiled, base, tmp_path, monkeypatch
):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "0")  # from the first shard on
    with pytest.raises(ValueError, match=r"2 of 7 items .* max_fault_share 0\.2 .*clip-1: "):
        encode(str(spoiled), tmp_path, base=base, batch_size=2, max_fault_share=0.2)
    assert [fault["key"] for fault in faults_of(tmp_path)] == ["clip-1", "clip-3"]
    assert not (tmp_path / "index.json").exists()
    assert [path.name for path in (tmp_path / "records").iterdir()] == [f"{FIRST[:-4]}.json"]
    assert [name for name in files(tmp_path) if name.endswith(".part")] == []
    encode(str(spoiled), tmp_path, base=base, batch_size=2, max_fault_share=0.5)
    assert len(faults_of(tmp_path)) == 3


def test_a_truncated_shard_costs_the_samples_behind_the_cut(shards, base, tmp_path):
    cut = shutil.copytree(shards, tmp_path / "video")
    last = dict(read_samples(str(cut), FIRST, STORE))["clip-2"]
    os.truncate(cut / FIRST, last["mp4"].offset + 100)
    (cut / THIRD).unlink()
    encode(str(cut), tmp_path / "out", base=base, max_fault_share=0.5)
    assert list(read_all(tmp_path / "out")) == ["clip-0", "clip-1", "clip-3", "clip-4"]
    reasons = {fault["key"]: fault["reason"] for fault in faults_of(tmp_path / "out")}
    assert list(reasons) == ["clip-2", "clip-5", "clip-6"]
    assert "its shard is cut at byte" in reasons["clip-2"] and reasons["clip-5"] == "its shard is absent"


def test_faults_are_found_before_anything_is_loaded(shards, base, tmp_path, monkeypatch):
    def loaded(*args, **kwargs):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoencoderKLMochi, "from_pretrained", loaded)
    for options, message in [
        ({"dtype": "int8"}, "got dtype 'int8'"),
        ({"text_dtype": "int8"}, "text_dtype 'int8'"),
        ({"processes": 0}, "processes 0"),
        ({"claim_timeout": 0}, "got claim_timeout 0"),
        ({"device": "blah"}, "got device 'blah', expected cpu, cuda"),
        ({"max_fault_share": -1}, "got max_fault_share -1, expected a share from 0 to 1"),
        ({"max_fault_share": 1.01}, "got max_fault_share 1.01"),
        ({"max_fault_share": float("nan")}, "got max_fault_share nan"),
        ({"base": tmp_path}, r"lacks vae/config\.json"),
        ({"base": "genmo/none"}, r"neither a local folder nor a downloaded hub id.*`hf download genmo/none`"),
        ({"base": tmp_path / "none"}, "does not exist; expected a diffusers folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            encode(str(shards), tmp_path / "out", **{"base": base, **options})
    with pytest.raises(ValueError, match="does not exist"):
        encode(str(tmp_path / "none"), tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_a_shard_that_cannot_be_written_stops_the_run(shards, base, tmp_path):
    (tmp_path / FIRST / "in the way").mkdir(parents=True)
    with pytest.raises(OSError, match=FIRST):
        encode(str(shards), tmp_path, base=base)
    assert not (tmp_path / "index.json").exists()
