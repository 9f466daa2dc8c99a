"""`reblock inspect`: what it says of whole, damaged and wrongly normalised shards, local and remote."""

import json
import logging
import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from data.inspect.command import inspect
from data.inspect.contact_sheet import draw_videos
from data.inspect.fonts import choose_fonts, replace_missing
from data.inspect.normalisation import normalisation_doubts
from data.pack.command import pack
from data.shards.format import read_samples, record_name
from data.storage.store import Store
from data.synth.command import synth
from data.video.worker_pool import WorkerPool
from launch.main import main
from tests.support.http_store import WebStore
from tests.support.latent_shards import write_latents

#: Like Mochi's: the deviations of its channels differ.
STD = [0.7, 0.85, 1.0, 1.2, 1.37]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    synth(root / "clips", clips=5, size=32, frames=9)
    pack(str(root / "clips"), root / "shards", buckets=["7x32x32"], shard_samples=3, processes=1)
    return root / "shards"


def latents(folder, scale=lambda c: STD[c], shift=0.0, **head):
    """Raw latents of deviation `scale` per channel."""

    def draw(i, shape):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(i))
        return noise * torch.tensor([scale(c) for c in range(shape[0])]).view(-1, 1, 1, 1) + shift

    facts = {"latents_std": STD, "latents_mean": [0.0] * 5, **head}
    return write_latents(folder, [("7x128x128", 6), ("19x128x128", 2)], channels=5, latent=draw, **facts)


def printed(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_video_shards_and_their_sheet(videos, tmp_path, capsys):
    inspect(str(videos), verify=True, contact_sheet=tmp_path / "sheet.png", processes=1)
    out = printed(capsys)
    for words in ("reblock-videos-2", "bucket 7x32x32", "5 samples (100.0%) in 2 shards", "32x32 h264: 5", "9 / 9 / 9"):
        assert words in out
    assert "verified: 2 checksums, 5 samples" in out and "fault" not in out.replace("left out as faulty", "")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100  # pictures, not an empty page


def test_verify_is_a_switch_of_the_command(videos, capsys):
    main(["inspect", "--verify", str(videos), "--processes", "1"])
    assert "verified: 2 checksums, 5 samples" in printed(capsys)


def test_remote_shards_give_the_same_output(videos, capsys):
    inspect(str(videos), verify=True, processes=1)
    local = capsys.readouterr().out
    with WebStore(videos) as web:
        inspect(web.url, verify=True, processes=1)
    remote = capsys.readouterr().out
    assert local.splitlines()[1:] == remote.splitlines()[1:] and "5 samples" in remote


def test_latent_shards_and_their_sheet(tmp_path, capsys):
    inspect(latents(tmp_path / "l"), verify=True, contact_sheet=tmp_path / "sheet.png")
    out = printed(capsys)
    assert "bucket 7x128x128" in out and "6 samples (75.0%)" in out and "verified" in out
    assert "in doubt" not in out and "expected about" not in out and "channel 4, normalised" in out
    assert "frames of a clip (least / median / most) │ 7 / 7 / 19" in out
    assert Image.open(tmp_path / "sheet.png").width > 500


def test_some_shards_of_several_folders(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(videos.parent)
    name = "7x32x32-000001.tar"
    inspect(f"shards/{name}", verify=True, processes=1)
    out = printed(capsys)
    assert "2 samples (100.0%) in 1 shards" in out and "verified: 1 checksums, 2 samples" in out
    latents(tmp_path / "a")
    latents(tmp_path / "b")
    inspect(str(tmp_path / "{a,b}"), verify=True, contact_sheet=tmp_path / "sheet.png")
    out = printed(capsys)
    assert "12 samples (75.0%) in 2 shards" in out and "verified: 4 checksums, 16 samples" in out
    inspect(str(tmp_path / "*" / "19x*.tar"))
    out = printed(capsys)
    assert "4 samples (100.0%) in 2 shards" in out and "bucket 7x" not in out
    for wrong, message in [
        (tmp_path / "none*", "matches nothing"),
        (tmp_path / "a" / "none.tar", "has no shards"),
        (f"{{{tmp_path}/a,shards}}", "has format 'reblock-videos-2', expected 'reblock-latents-2'"),
    ]:
        with pytest.raises(ValueError, match=message):
            inspect(str(wrong))


#: Chinese, Arabic, Devanagari, a sign of the private use area (which no font should have), formula signs, controls.
CAPTION = "\u4e2d\u6587 \u0639\u0631\u0628\u064a \u0939\u093f \ue0ff $x_{ \\frac a\0b\tc\u200d\U0001f600"


def test_any_caption_is_drawn_without_a_warning(tmp_path, caplog):
    synth(tmp_path / "clips", clips=2, size=32, frames=9)
    for path in (tmp_path / "clips").glob("*.txt"):
        path.write_text(CAPTION)
    pack(str(tmp_path / "clips"), tmp_path / "shards", buckets=["7x32x32"], processes=1)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        inspect(str(tmp_path / "shards"), contact_sheet=tmp_path / "sheet.png")
    assert caplog.records == [] and Image.open(tmp_path / "sheet.png").format == "PNG"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_characters_without_a_font_become_boxes():
    drawn = replace_missing(CAPTION, fonts := choose_fonts([CAPTION]))
    # The usual font has Arabic; others depend on the machine.
    assert "\u0639\u0631\u0628\u064a" in drawn and "$x_{ \\frac a\u25a1b" in drawn and fonts[0] == "DejaVu Sans"
    assert replace_missing("plain, \u00e9 \u2192", choose_fonts(["plain, \u00e9 \u2192"])) == "plain, \u00e9 \u2192"
    assert "Last Resort High-Efficiency" not in fonts


def test_a_sheet_that_cannot_be_written_is_an_error_of_one_line(videos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"contact sheet cannot be written: .*sheet\.png'$") as failed:
        inspect(str(videos), contact_sheet=tmp_path / "file" / "sheet.png")
    assert "\n" not in str(failed.value)
    with pytest.raises(ValueError, match="a folder; expected a file"):
        inspect(str(videos), contact_sheet=tmp_path)


@pytest.mark.parametrize(
    "how, doubt",
    [
        ({"scale": lambda c: 5 * STD[c]}, "far from mean 0 and deviation 1"),
        ({"shift": 3.0}, "far from mean 0"),
        ({"scale": lambda c: 1.0}, "normalised twice"),  # stored after normalisation
        ({"latents_std": [1.0] * 5, "scale": lambda c: 4.0}, "far from mean 0"),
    ],
)
def test_wrong_normalisation_is_flagged(tmp_path, capsys, how, doubt):
    inspect(latents(tmp_path / "l", **how))
    assert "normalisation in doubt" in (out := printed(capsys)) and doubt in out


def test_right_normalisation_is_not_flagged():
    rng = np.random.default_rng(0)
    for _ in range(200):
        std = np.exp(rng.normal(0, 0.1, 12))
        vae = rng.uniform(0.8, 1.2, 12)
        assert normalisation_doubts(rng.normal(0, 0.1, 12), std, [0.0] * 12, vae.tolist()) == []


def corrupt_shard(folder, name):
    raw = bytearray((folder / name).read_bytes())
    raw[2000] ^= 0xFF
    (folder / name).write_bytes(raw)


def cut_shard(folder, name):
    (folder / name).write_bytes((folder / name).read_bytes()[:3000])


def move_member(folder, name):
    record = json.loads((folder / record_name(name)).read_text())
    record["samples"][0][1]["json"][0] += 512
    (folder / record_name(name)).write_text(json.dumps(record))


def unlist_sample(folder, name):
    """As if it had never been listed, in the index either."""
    for path in (folder / record_name(name), folder / "index.json"):
        content = json.loads(path.read_text())
        if "entry" in content:
            content["samples"].pop()
        else:
            content["shards"][0]["samples"] -= 1
        path.write_text(json.dumps(content))


def drop_from_record(folder, name):
    record = json.loads((folder / record_name(name)).read_text())
    record["samples"].pop()
    (folder / record_name(name)).write_text(json.dumps(record))


@pytest.mark.parametrize(
    "damage, fault",
    [
        (corrupt_shard, "checksum differs"),
        (cut_shard, "cut"),
        (move_member, "is not where the record says"),
        (unlist_sample, "clip-05: it is in the archive and not in the record"),
        (drop_from_record, "its record lists 5 samples, the index 6"),
        (lambda folder, name: (folder / name).unlink(), "No such file"),
    ],
)
def test_verify_names_damaged_shards(tmp_path, capsys, damage, fault):
    folder = latents(tmp_path / "l")
    damage(tmp_path / "l", "7x128x128-000000.tar")
    with pytest.raises(ValueError, match="faults in"):
        inspect(folder, verify=True)
    assert fault in printed(capsys)


def test_verify_names_latents_that_are_not_finite(tmp_path, capsys):
    def broken(i, shape):
        return torch.full(shape, float("nan") if i == 2 else 0.5)

    folder = write_latents(tmp_path / "l", [("7x32x32", 4)], latent=broken)
    with pytest.raises(ValueError, match="1 faults"):
        inspect(folder, verify=True)
    assert "clip-02: it holds numbers that are not finite" in printed(capsys)


def test_a_clip_that_does_not_decode_is_named_by_verify(videos, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "v")
    name = "7x32x32-000000.tar"
    record = json.loads((tmp_path / "v" / record_name(name)).read_text())
    key, members = record["samples"][1]
    offset, size = members["mp4"]
    raw = bytearray((tmp_path / "v" / name).read_bytes())
    raw[offset : offset + size] = bytes(size)
    (tmp_path / "v" / name).write_bytes(raw)
    with pytest.raises(ValueError, match="faults"):
        inspect(str(tmp_path / "v"), verify=True, processes=1)
    assert f"{key}: clip of {size} bytes cannot be decoded" in printed(capsys)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda members, raw: members.pop("txt"), "no caption"),
        (lambda members, raw: raw.__setitem__(slice(None), raw.replace(b'"indices"', b'"indicez"')), "window without"),
        (lambda members, raw: raw.__setitem__(slice(None), raw.replace(b", 5, 6]", b", 5   ]")), "window of 6"),
    ],
)
def test_a_clip_that_lacks_a_member_is_a_fault(videos, tmp_path, capsys, damage, reason):
    shutil.copytree(videos, tmp_path / "v")
    shard, record = tmp_path / "v" / "7x32x32-000000.tar", tmp_path / "v" / record_name("7x32x32-000000.tar")
    facts, raw = json.loads(record.read_text()), bytearray(shard.read_bytes())
    damage(facts["samples"][0][1], raw)
    record.write_text(json.dumps(facts))
    shard.chmod(0o644)
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match="faults"):
        inspect(str(tmp_path / "v"), verify=True, contact_sheet=tmp_path / "sheet.png", processes=1)
    assert reason in printed(capsys) and (tmp_path / "sheet.png").is_file()


def test_a_latent_of_another_bucket_is_named_by_verify(tmp_path, capsys):
    folder = write_latents(tmp_path / "l", [("7x32x32", 2), ("7x32x48", 2), ("7x32x48", 2)])
    index = tmp_path / "l" / "index.json"
    facts = json.loads(index.read_text())
    facts["shards"][1]["bucket"] = "7x32x32"
    index.write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="2 faults"):
        inspect(folder, verify=True)
    assert "clip-02: its latent is (2, 2, 4, 6)" in printed(capsys)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a clip that hangs is a pipe")
def test_a_clip_that_hangs_does_not_block_the_sheet(videos, tmp_path, capsys):
    shutil.copytree(videos, tmp_path / "v")
    shard = tmp_path / "v" / "7x32x32-000000.tar"
    shard.unlink()
    os.mkfifo(shard)  # nobody ever writes to it
    facts = [(f"{tmp_path / 'v'}/{name}", *sample) for name in ("7x32x32-000000.tar", "7x32x32-000001.tar")
             for sample in read_samples(str(tmp_path / "v"), name, Store())]  # fmt: skip
    with WorkerPool(1, deadline=2.0) as pool:
        draw_videos([facts[0], facts[-1]], Store(), tmp_path / "sheet.png", pool)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100  # of the other clip
