"""Packing clips and captions: what is packed, what is left out and named, what is kept when run again."""

import json

import pytest
import webdataset

from data.pack import find_clips, pack
from data.synth import synth
from data.video import decode_video


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    synth(folder, clips=7, frames=7, size=32)
    return folder


@pytest.fixture
def clips(made, tmp_path):
    """A folder of seven clips that a test may spoil."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in made.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def index_of(folder):
    return json.loads((folder / "index.json").read_text())


def test_webdataset_finds_clip_caption_and_probe(clips, tmp_path):
    pack(clips, tmp_path / "out", samples_per_shard=3, frames=7)
    index = index_of(tmp_path / "out")
    assert index["format"] == "reblock-videos-1"
    assert [shard["samples"] for shard in index["shards"]] == [3, 3, 1]
    shards = [str(tmp_path / "out" / shard["name"]) for shard in index["shards"]]
    seen = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in seen] == [f"clip-{i:06d}" for i in range(7)]
    for sample in seen:
        assert sample["mp4"] == (clips / f"{sample['__key__']}.mp4").read_bytes()
        assert sample["txt"].decode() == (clips / f"{sample['__key__']}.txt").read_text().strip()
        probe = json.loads(sample["json"])
        assert (probe["frames"], probe["fps"], probe["height"], probe["width"]) == (7, 12.0, 32, 32)
        assert decode_video(sample["mp4"]).shape == (7, 32, 32, 3)


def test_faulty_clips_are_left_out_and_named(clips, tmp_path):
    (clips / "clip-000001.mp4").write_bytes(b"not a video")
    (clips / "clip-000004.txt").unlink()
    short = tmp_path / "short"
    synth(short, clips=1, frames=3, size=32)
    (clips / "clip-000005.mp4").write_bytes((short / "clip-000000.mp4").read_bytes())
    pack(clips, tmp_path / "out", samples_per_shard=2, frames=7, max_fault_share=0.5)
    faults = [json.loads(line) for line in (tmp_path / "out" / "faults.jsonl").read_text().splitlines()]
    assert [fault["key"] for fault in faults] == ["clip-000001", "clip-000004", "clip-000005"]
    for fault, reason in zip(faults, ("cannot be decoded", "no caption", "3 frames, expected at least 7"), strict=True):
        assert reason in fault["reason"]
    index = index_of(tmp_path / "out")
    assert (index["samples"], index["faults"]) == (4, 3)
    # Clips 4 and 5 are a shard of their own, which holds nothing and is not listed.
    assert [shard["samples"] for shard in index["shards"]] == [1, 2, 1]


def test_too_many_faults_fail_the_run_and_leave_no_index(clips, tmp_path):
    (clips / "clip-000001.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"1 of 7 items .* more than max_fault_share 0.01 .*clip-000001"):
        pack(clips, tmp_path / "out", frames=7)
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(ValueError, match="1 of 7 items"):  # also when the faulty shard is finished already
        pack(clips, tmp_path / "out", frames=7)


def test_finished_shards_are_kept_and_missing_ones_made_again(clips, tmp_path, capsys):
    out = tmp_path / "out"
    pack(clips, out, samples_per_shard=3, frames=7)
    before = index_of(out)
    stamp = (out / "shard-000000.tar").stat().st_mtime_ns
    (out / "shard-000001.tar").unlink()
    (out / "index.json").unlink()
    pack(clips, out, samples_per_shard=3, frames=7)
    assert "2 of 3 shards are finished already" in capsys.readouterr().out
    assert index_of(out) == before
    assert (out / "shard-000000.tar").stat().st_mtime_ns == stamp


def test_other_settings_and_other_clips_are_refused(clips, tmp_path):
    pack(clips, tmp_path / "out", frames=7)
    with pytest.raises(ValueError, match="samples_per_shard"):
        pack(clips, tmp_path / "out", frames=7, samples_per_shard=2)
    (clips / "clip-000006.txt").write_text("another caption")
    with pytest.raises(ValueError, match="listing"):
        pack(clips, tmp_path / "out", frames=7)


def test_captions_missing_altogether(clips, tmp_path):
    with pytest.raises(ValueError, match=r"none of the 7 clips .* has a caption; expected files like .*\.caption"):
        pack(clips, tmp_path / "out", frames=7, caption_suffix=".caption")
    assert not (tmp_path / "out").exists()


def test_an_empty_caption_is_a_caption(clips, tmp_path):
    (clips / "clip-000000.txt").write_text("\n")
    pack(clips, tmp_path / "out", frames=7)
    sample = next(iter(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False)))
    assert sample["txt"] == b""


def test_nothing_to_pack(tmp_path):
    with pytest.raises(ValueError, match="neither a folder of clips and captions nor a table"):
        pack(tmp_path / "none", tmp_path / "out")
    with pytest.raises(ValueError, match="holds no clip"):
        pack(tmp_path, tmp_path / "out")


def test_keys_come_from_paths_and_must_differ(tmp_path):
    for name in ("b/x.mp4", "a/x.v2.mp4", ".hidden/y.mp4", "a/.part.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        (tmp_path / name).with_suffix(".txt").touch()
    assert list(find_clips(tmp_path)) == ["a--x_v2", "b--x"]
    (tmp_path / "a" / "x_v2.mp4").touch()
    with pytest.raises(ValueError, match="would both be packed as 'a--x_v2'"):
        find_clips(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_tables_of_clips_and_captions(clips, tmp_path, suffix):
    rows = [{"clip": f"clips/clip-{i:06d}.mp4", "caption": f"caption, {i}"} for i in (3, 0)]
    lines = ["clip,caption", *(f'{r["clip"]},"{r["caption"]}"' for r in rows)]
    text = "\n".join(lines) if suffix == ".csv" else "\n".join(map(json.dumps, rows)) + "\n\n"
    (tmp_path / f"table{suffix}").write_text(text)
    pack(tmp_path / f"table{suffix}", tmp_path / "out", frames=7)
    seen = list(webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False))
    assert [(s["__key__"], s["txt"]) for s in seen] == [
        ("clips--clip-000000", b"caption, 0"),
        ("clips--clip-000003", b"caption, 3"),
    ]
    (tmp_path / f"bad{suffix}").write_text('{"clip": "x.mp4"}\n' if suffix == ".jsonl" else "clip,text\nx.mp4,hello\n")
    with pytest.raises(ValueError, match=f"row 1 of .*bad{suffix} has .*expected `clip` and `caption`"):
        pack(tmp_path / f"bad{suffix}", tmp_path / "out2")
