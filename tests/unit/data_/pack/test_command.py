"""Packing captioned clips: what the shards hold, which clips are left out and listed, and how a run continues."""

import json
import os
import re
import tarfile
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from data.bucket import Bucket, parse_buckets
from data.pack.entries import VIDEO_EXTENSIONS, Columns
from data.pack.filters import Filters
from data.stream.clips import ClipReader
from data.stream.reader import Visit
from data.video.decode import decode_video
from data.video.write import write_video
from launch.main import main
from tests.support.broken_clips import BROKEN, SOUND, make
from tests.support.drawn_clips import changing_frames
from tests.support.packing import pack_small, packed_files, read_lines, read_shards


def test_webdataset_finds_clip_caption_and_facts(clips, tmp_path):
    index = pack_small(clips, tmp_path / "out", shard_samples=3)
    assert index["format"] == "reblock-videos-2" and index["buckets"] == {"7x32x32": {"samples": 7, "shards": 3}}
    assert [(s["name"], s["samples"]) for s in index["shards"]] == [
        ("7x32x32-000000.tar", 3), ("7x32x32-000001.tar", 3), ("7x32x32-000002.tar", 1)
    ]  # fmt: skip
    seen = read_shards(tmp_path / "out")
    assert [sample["__key__"] for sample in seen] == [f"clip-{i:06d}" for i in range(7)]
    for sample in seen:
        assert sample["mp4"] == (clips / f"{sample['__key__']}.mp4").read_bytes()
        assert sample["txt"].decode() == (clips / f"{sample['__key__']}.txt").read_text().strip()
        facts = json.loads(sample["json"])
        assert list(facts) == ["source", "sha256", "codec", "frames", "fps", "height", "width", "duration", "indices",
                               "bucket"]  # fmt: skip
        assert facts["source"] == f"{sample['__key__']}.mp4" and facts["indices"] == list(range(7))
        assert (facts["frames"], facts["fps"], facts["height"], facts["width"]) == (7, 12.0, 32, 32)


def test_faulty_clips_are_left_out_and_named(clips, tmp_path, capsys):
    (clips / "clip-000001.mp4").write_bytes(b"not a video")
    (clips / "clip-000002.mp4").write_bytes(b"")
    (clips / "clip-000004.txt").unlink()
    (clips / "clip-000005.txt").write_bytes(b"caf\xe9")
    (clips / "clip-000006.mp4").unlink()
    (clips / "clip-000006.mp4").symlink_to(clips / "nowhere.mp4")
    index = pack_small(clips, tmp_path / "out", max_fault_share=0.9)
    faults = read_lines(tmp_path / "out" / "faults.jsonl")
    reasons = {1: "", 2: "empty", 4: "no caption clip-000004.txt", 5: "not UTF-8", 6: "link to nothing"}
    assert [fault["key"] for fault in faults] == [f"clip-{i:06d}" for i in reasons]
    for fault, reason in zip(faults, reasons.values(), strict=True):
        assert reason in fault["reason"] and fault["shard"] == str(clips)
    assert (index["samples"], index["faults"]) == (2, 5)
    assert "faults: 5" in capsys.readouterr().out


def test_too_many_faults_stop_the_run_and_leave_no_index(clips, tmp_path, monkeypatch):
    monkeypatch.setattr("data.pack.probe_source.CHUNK", 2)
    (clips / "clip-000001.mp4").write_bytes(b"not a video")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"1 of 7 items .* more than max_fault_share 0.01 .*clip-000001.*faults"):
            pack_small(clips, tmp_path / "out")
        [fault] = read_lines(tmp_path / "out" / "faults.jsonl")
        assert fault["key"] == "clip-000001" and "cannot be decoded" in fault["reason"]
        assert not (tmp_path / "out" / "index.json").exists()
    # It stops as soon as there are too many: the last clips were not probed.
    assert not (tmp_path / "out" / "survey" / "000003.jsonl").exists()
    assert pack_small(clips, tmp_path / "out", max_fault_share=0.2)["samples"] == 6


def test_finished_shards_are_kept_and_missing_ones_made_again(clips, tmp_path, capsys):
    out = tmp_path / "out"
    pack_small(clips, out, shard_samples=3)
    before = packed_files(out)
    stamp = (out / "7x32x32-000000.tar").stat().st_mtime_ns
    (out / "7x32x32-000001.tar").unlink()
    (out / "index.json").unlink()
    pack_small(clips, out, shard_samples=3, processes=2)
    assert "2 of 3 shards are finished already" in capsys.readouterr().out
    assert packed_files(out) == before
    assert (out / "7x32x32-000000.tar").stat().st_mtime_ns == stamp


def test_other_settings_and_other_clips_are_refused(clips, tmp_path):
    pack_small(clips, tmp_path / "out")
    with pytest.raises(ValueError, match=r"shard_samples': \(1024, 2\)"):
        pack_small(clips, tmp_path / "out", shard_samples=2)
    with pytest.raises(ValueError, match="min_seconds"):
        pack_small(clips, tmp_path / "out", filters=Filters(min_seconds=0.1))
    (clips / "clip-000006.txt").write_text("another caption")
    with pytest.raises(ValueError, match="listing"):
        pack_small(clips, tmp_path / "out")


def test_a_clip_that_changes_after_the_survey_is_a_fault(clips, tmp_path):
    out = tmp_path / "out"
    pack_small(clips, out)
    (out / "7x32x32-000000.tar").unlink()
    content = bytearray((clips / "clip-000003.mp4").read_bytes())
    content[-1] ^= 1
    (clips / "clip-000003.mp4").write_bytes(content)
    with pytest.raises(ValueError, match=r"clip-000003: .*changed since"):
        pack_small(clips, out)
    with pytest.raises(ValueError, match=r"clip-000003: .*changed since"):  # a finished shard's faults count too
        pack_small(clips, out)


def test_a_source_without_captions_is_refused(clips, tmp_path):
    with pytest.raises(ValueError, match=r"none of the 7 clips .* has a caption; .*clip-000000\.caption"):
        pack_small(clips, tmp_path / "out", columns=Columns(caption_suffix=".caption"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        ({"buckets": ["8x32x32"]}, "frames 8"), ({"buckets": []}, "got buckets"), ({"buckets": ["7x32"]}, "7x32"),
        ({"shard_samples": 0}, "shard_samples 0"), ({"fps": 0.0}, "fps"), ({"window": "last"}, "'last'"),
        ({"deadline": 0.0}, "deadline"), ({"duplicates": "mark"}, "keep or drop"),
        ({"split_scenes": True, "scene_threshold": 3.0}, "scene_threshold"),
    ],
)  # fmt: skip
def test_wrong_options_are_named_before_anything_is_written(clips, tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        pack_small(clips, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_filters_that_no_clip_can_meet_are_refused():
    with pytest.raises(ValueError, match=r"min_fps -1.*min_seconds 3 above max_seconds 2.*max_aspect 0.5"):
        Filters(min_fps=-1, min_seconds=3, max_seconds=2, max_aspect=0.5)


def test_filtered_clips_are_listed_and_counted(clips, tmp_path, capsys):
    (clips / "clip-000000.txt").write_text("\n")
    (clips / "clip-000001.txt").write_text("x" * 500)
    write_video(clips / "clip-000002.mp4", changing_frames(13), 12)
    write_video(clips / "clip-000003.mp4", changing_frames(7)[:, :16], 12)
    write_video(clips / "clip-000004.mp4", changing_frames(3), 12)
    write_video(clips / "clip-000005.mp4", changing_frames(7), 60)
    index = pack_small(
        clips, tmp_path / "out", filters=Filters(max_seconds=1.0, max_fps=30, min_caption=1, max_caption=200)
    )
    assert index["samples"] == 1 and index["faults"] == 0
    found = {
        line["key"][-1]: (line["filter"], line["reason"]) for line in read_lines(tmp_path / "out" / "filtered.jsonl")
    }
    assert {key: name for key, (name, _) in found.items()} == {
        "0": "min_caption", "1": "max_caption", "2": "max_seconds", "3": "bucket", "4": "bucket", "5": "max_fps"
    }  # fmt: skip
    assert "16x32" in found["3"][1] and "3 frames" in found["4"][1] and "7x32x32" in found["4"][1]
    assert "filtered: 2 by bucket, 1 by max_caption" in capsys.readouterr().out


def test_an_empty_caption_is_a_caption(clips, tmp_path):
    (clips / "clip-000000.txt").write_text("\n")
    pack_small(clips, tmp_path / "out")
    assert read_shards(tmp_path / "out")[0]["txt"] == b""


def test_the_same_source_gives_the_same_bytes(clips, tmp_path):
    (clips / "clip-000001.mp4").write_bytes(b"not a video")
    write_video(clips / "clip-000002.mp4", changing_frames(40), 12)
    options = {"shard_samples": 2, "window": "all", "max_fault_share": 0.5}
    pack_small(clips, tmp_path / "one", processes=1, **options)
    pack_small(clips, tmp_path / "three", processes=3, **options)
    assert packed_files(tmp_path / "one") == packed_files(tmp_path / "three")


@pytest.mark.slow
def test_clips_of_every_kind_are_packed_or_named(tmp_path):
    sound = [name for name, kind in SOUND.items() if kind.suffix[1:] in VIDEO_EXTENSIONS]
    for name in (*sound, *BROKEN):
        make(name, tmp_path / "src").with_suffix(".txt").write_text(name)
    pack_small(
        tmp_path / "src", tmp_path / "out", buckets=["1x32x32", "7x32x32", "19x32x32", "19x16x16"], max_fault_share=0.9
    )
    faults = {fault["key"]: fault["reason"] for fault in read_lines(tmp_path / "out" / "faults.jsonl")}
    assert set(faults) == set(BROKEN)
    for name, reason in faults.items():
        assert re.search(BROKEN[name].reason, reason), (name, reason)
    seen = {sample["__key__"]: sample for sample in read_shards(tmp_path / "out")}
    assert set(seen) == set(sound)
    for name in sound:
        facts = json.loads(seen[name]["json"])
        kind = SOUND[name]
        shape = (kind.frames, kind.height, kind.width)
        assert (facts["codec"], facts["frames"], facts["height"], facts["width"]) == (kind.codec, *shape), name
        content = next(seen[name][e] for e in VIDEO_EXTENSIONS if e in seen[name])
        bucket = Bucket.parse(facts["bucket"])
        shape = (bucket.frames, bucket.height, bucket.width)
        assert decode_video(content, facts["indices"], *shape[1:]).shape == (*shape, 3)


def test_the_command_reads_options_of_groups(clips, tmp_path, capsys):
    table = tmp_path / "table.csv"
    table.write_text("file,text\nclips/clip-000001.mp4,hello\nclips/clip-000002.mp4,hello there\n")
    main(["pack", str(table), str(tmp_path / "out"), "--buckets", '["7x32x32"]', "--columns.clip", "file",
          "--columns.caption", "text", "--filters.min_caption", "6", "--processes", "1"])  # fmt: skip
    assert [s["txt"] for s in read_shards(tmp_path / "out")] == [b"hello there"]
    with pytest.raises(SystemExit):
        main(["pack", "--help"])
    text = capsys.readouterr().out
    for option in ("--buckets", "--filters.min_seconds", "--columns.caption_suffix", "--allow_pipe"):
        assert option in text


def test_two_runs_in_one_folder_are_refused(clips, tmp_path):
    (tmp_path / "out" / "survey").mkdir(parents=True)
    with FileLock(tmp_path / "out" / "survey" / "lock"):
        with pytest.raises(ValueError, match="another `reblock pack` is at work"):
            pack_small(clips, tmp_path / "out")
    pack_small(clips, tmp_path / "out")


def test_temporary_files_are_removed(clips, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".7x32x32-000000.tar.0123.part").write_bytes(b"of a killed run")
    pack_small(clips, tmp_path / "out")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name.endswith(".part")]
    assert sorted(os.listdir(tmp_path / "out")) == [
        "7x32x32-000000.tar", "duplicates.jsonl", "faults.jsonl", "filtered.jsonl", "index.json", "records", "survey"
    ]  # fmt: skip
    with tarfile.open(tmp_path / "out" / "7x32x32-000000.tar") as archive:
        assert len(archive.getnames()) == 21


def test_the_shipped_recipe_packs(clips, tmp_path):
    recipe = Path(__file__).resolve().parents[4] / "recipes" / "data" / "pack_mochi.yaml"
    main(["pack", str(clips), str(tmp_path / "out"), "--config", str(recipe), "--processes", "1",
          "--buckets", '["7x32x32"]', "--fps", "12", "--filters.min_fps", "1"])  # fmt: skip
    settings = json.loads((tmp_path / "out" / "index.json").read_text())["settings"]
    assert settings["window"] == "all" and settings["filters"]["min_caption"] == 8 and settings["fps"] == 12
    assert parse_buckets(yaml.safe_load(recipe.read_text())["buckets"])


def test_clips_for_another_family_have_its_frames_and_the_index_names_it(clips, tmp_path):
    index = pack_small(clips, tmp_path / "wan", buckets="5x32x32", family="wan")
    assert index["family"] == index["settings"]["family"] == "wan" and list(index["buckets"]) == ["5x32x32"]
    sample = ClipReader([str(tmp_path / "wan")]).try_load(0, 0, Visit(0))
    assert sample is not None and sample.video.shape == (5, 32, 32, 3)
    assert "family" not in pack_small(clips, tmp_path / "mochi")
    with pytest.raises(ValueError, match=r"got frames 7, expected 4 k \+ 1 for Wan 2\.1, for example 5 or 9"):
        pack_small(clips, tmp_path / "out", family="wan")
