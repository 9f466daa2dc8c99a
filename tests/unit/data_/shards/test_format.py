"""Shards, their records and their index: what is written is found again by place; what is wrong is named."""

import json
import os
import random

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data.bucket import Bucket
from data.shards.folder import TEXT, ShardFolder, changes, write_tar
from data.shards.format import (
    LATENT_FORMAT,
    VIDEO_FORMAT,
    Fault,
    caption_key,
    check_fault_share,
    clip_extension,
    read_clip,
    read_index,
    read_json,
    read_member,
    read_samples,
    record_name,
    shard_name,
    text_digest,
    truncated_samples,
)
from data.storage.store import Store
from tests.support.http_store import WebStore

BUCKET = Bucket(19, 64, 64)
STORE = Store(backoff=0.01)
CLIPS = [
    {"__key__": f"clip-{i}", "mp4": bytes([i]) * (1 + 700 * i), "txt": f"caption é {i}", "json": json.dumps({"n": i})}
    for i in range(3)
]


def folder_of(path, shards=(CLIPS, CLIPS[:1]), head=None, settings=None):
    folder = ShardFolder(path, settings or {"a": 1})
    names = [shard_name(BUCKET, number) for number in range(len(shards))]
    for name, samples in zip(names, shards, strict=True):
        folder.write(name, BUCKET, samples, [Fault("bad", "is empty", name)])
    folder.finish(names, head or {"format": VIDEO_FORMAT})
    return names


def test_samples_are_read_by_place_locally_and_remotely(tmp_path):
    name, _ = folder_of(tmp_path)
    with WebStore(tmp_path) as web:
        for folder in (str(tmp_path), web.url):
            listed = read_samples(folder, name, STORE)
            assert [key for key, _ in listed] == ["clip-0", "clip-1", "clip-2"]
            shard = f"{folder}/{name}"
            for sample, (_, members) in zip(CLIPS, listed, strict=True):
                assert read_clip(shard, members, STORE) == sample["mp4"] and clip_extension(members) == "mp4"
                assert read_member(shard, members["txt"], STORE).decode() == sample["txt"]
                assert read_json(shard, members, STORE) == json.loads(sample["json"])
            assert read_index(folder, STORE, VIDEO_FORMAT) == read_index(folder, STORE)


def test_index_and_faults(tmp_path):
    names = folder_of(tmp_path)
    index = read_index(str(tmp_path), STORE)
    assert index["samples"] == 4 and index["faults"] == 2 and [s["name"] for s in index["shards"]] == names
    assert index["buckets"] == {"19x64x64": {"samples": 4, "shards": 2}}
    assert index["bytes"] == sum((tmp_path / name).stat().st_size for name in names)
    lines = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert lines == [{"shard": name, "key": "bad", "reason": "is empty"} for name in names]


def test_a_caption_that_samples_share_lies_in_a_shard_once(tmp_path):
    first, second = text_digest("a"), text_digest("b")
    rows = [
        {"__key__": caption_key(first), "safetensors": b"embedding of a"},
        {"__key__": "x", "safetensors": b"latent x", "json": "{}", TEXT: first},
        {"__key__": "y", "safetensors": b"latent y", "json": "{}", TEXT: first},
        {"__key__": caption_key(second), "safetensors": b"embedding of b"},
        {"__key__": "z", "safetensors": b"latent z", "json": "{}", TEXT: second},
    ]
    (name,) = folder_of(tmp_path, [rows], {"format": LATENT_FORMAT})
    listed = dict(read_samples(str(tmp_path), name, STORE))
    assert list(listed) == ["x", "y", "z"]
    texts = {key: read_member(str(tmp_path / name), members["text"], STORE) for key, members in listed.items()}
    assert texts == {"x": b"embedding of a", "y": b"embedding of a", "z": b"embedding of b"}
    assert listed["x"]["text"] == listed["y"]["text"]
    assert (tmp_path / name).read_bytes().count(b"embedding of a") == 1


def test_a_sample_that_is_called_like_a_caption_is_a_sample(tmp_path):
    digest = text_digest("hello")
    rows = [
        {"__key__": caption_key(digest), "safetensors": b"embedding"},
        {"__key__": f"text-{digest}", "safetensors": b"latent", "json": "{}", TEXT: digest},
    ]
    (name,) = folder_of(tmp_path, [rows], {"format": LATENT_FORMAT})
    ((key, members),) = read_samples(str(tmp_path), name, STORE)
    assert key == f"text-{digest}" and read_index(str(tmp_path), STORE)["samples"] == 1
    assert read_member(str(tmp_path / name), members["safetensors"], STORE) == b"latent"
    assert read_member(str(tmp_path / name), members["text"], STORE) == b"embedding"


@pytest.mark.parametrize("key", ["x", caption_key(text_digest("a")), "x.y"])
def test_a_sample_that_the_archive_would_lose_stops_the_shard(tmp_path, key):
    digest = text_digest("a")
    rows = [
        {"__key__": caption_key(digest), "safetensors": b"embedding"},
        {"__key__": "x", "safetensors": b"first", TEXT: digest},
        {"__key__": key, "safetensors": b"second", TEXT: digest},
    ]
    with pytest.raises(ValueError, match=rf"does not list 1 of the 3 entries .* first '{key}'"):
        folder_of(tmp_path, [rows], {"format": LATENT_FORMAT})
    assert not (tmp_path / record_name(shard_name(BUCKET, 0))).exists()


def test_what_changed_is_said_in_a_few_words():
    there, now = {"same": 1, "a": "x" * 1000, "b": [2]}, {"same": 1, "a": 3, "c": None}
    said = changes(there, now)
    assert "same" not in said and len(said) < 150 and "b is [2] there, None now" in said
    assert changes(dict.fromkeys("abcdefgh", 1), {}).endswith("; and 3 more")


def test_webdataset_reads_them_and_equal_samples_give_equal_bytes(tmp_path):
    write_tar(tmp_path / "a.tar", CLIPS)
    write_tar(tmp_path / "b.tar", CLIPS)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    seen = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(s["__key__"], s["mp4"]) for s in seen] == [(s["__key__"], s["mp4"]) for s in CLIPS]


def test_a_failed_write_leaves_the_old_archive_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, CLIPS)
    before = path.read_bytes()

    def failing():
        yield CLIPS[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_tar(path, failing())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("keep, lost", [(0, 3), (600, 3), (3000, 2), (7000, 1)])
def test_what_lies_behind_a_cut_is_known_without_reading(tmp_path, keep, lost):
    first, second = folder_of(tmp_path)
    index = read_index(str(tmp_path), STORE)
    assert truncated_samples(str(tmp_path), index, STORE) == []
    os.truncate(tmp_path / first, keep)
    faults = truncated_samples(str(tmp_path), index, STORE)
    assert [f.key for f in faults] == [f"clip-{i}" for i in range(3 - lost, 3)]
    assert all(f.shard.endswith(first) and str(keep) in f.reason for f in faults)
    listed = dict(read_samples(str(tmp_path), first, STORE))
    for key, members in listed.items():
        if key in {f.key for f in faults}:
            last = max(members.values(), key=lambda member: member.offset)
            with pytest.raises(ValueError, match="cut short"):
                read_member(str(tmp_path / first), last, STORE)
        else:
            read_clip(str(tmp_path / first), members, STORE)
    (tmp_path / second).unlink()
    assert {f.reason for f in truncated_samples(str(tmp_path), index, STORE)[lost:]} == {"its shard is absent"}


def test_finished_shards_are_kept_and_other_settings_refused(tmp_path):
    name, _ = folder_of(tmp_path)
    assert ShardFolder(tmp_path, {"a": 1}).finished(name)["entry"]["samples"] == 3
    assert ShardFolder(tmp_path, {"a": 1}).finished("absent.tar") is None
    with pytest.raises(ValueError, match=r"other settings: a is 1 there, 2 now\. Choose"):
        ShardFolder(tmp_path, {"a": 2}).finished(name)
    (tmp_path / record_name(name)).write_text("{")
    assert ShardFolder(tmp_path, {"a": 1}).finished(name) is None


def test_no_index_before_the_last_shard(tmp_path):
    folder = ShardFolder(tmp_path, {})
    folder.write(shard_name(BUCKET, 0), BUCKET, CLIPS, [])
    names = [shard_name(BUCKET, 0), shard_name(BUCKET, 1)]
    assert folder.finish(names, {"format": VIDEO_FORMAT}) is None and not (tmp_path / "index.json").exists()
    folder.write(names[1], BUCKET, [], [])
    index = folder.finish(names, {"format": VIDEO_FORMAT})
    assert [shard["name"] for shard in index["shards"]] == names[:1]  # an empty shard is not listed


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_index(str(tmp_path / "none"), STORE)
    with pytest.raises(ValueError, match=r"no index\.json"):
        read_index(str(tmp_path), STORE)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_index(str(tmp_path), STORE)
    folder_of(tmp_path)
    with pytest.raises(ValueError, match="Encode them first"):
        read_index(str(tmp_path), STORE, LATENT_FORMAT)
    folder_of(tmp_path, head={"format": LATENT_FORMAT})
    with pytest.raises(ValueError, match="latents already; give the video shards"):
        read_index(str(tmp_path), STORE, VIDEO_FORMAT)
    folder_of(tmp_path, head={"format": "reblock-videos-1"})
    with pytest.raises(ValueError, match="another version"):
        read_index(str(tmp_path), STORE, VIDEO_FORMAT)
    folder_of(tmp_path, shards=[[]])
    with pytest.raises(ValueError, match="lists no sample"):
        read_index(str(tmp_path), STORE)


@pytest.mark.parametrize("content", ["", "{", '{"samples": 3}', "{}", '{"samples": [["a", {"mp4": [1]}]]}'])
def test_a_damaged_record_is_named(tmp_path, content):
    name, _ = folder_of(tmp_path)
    (tmp_path / record_name(name)).write_text(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_samples(str(tmp_path), name, STORE)


def test_samples_with_odd_members_are_named(tmp_path):
    rows = [{"__key__": "a", "mp4": b"x", "mov": b"y"}, {"__key__": "b", "txt": "z"}, {"__key__": "c", "json": "[1]"}]
    (name,) = folder_of(tmp_path, [rows])
    shard = str(tmp_path / name)
    two, none, listed = (members for _, members in read_samples(str(tmp_path), name, STORE))
    for members in (two, none):
        with pytest.raises(ValueError, match="expected one video"):
            read_clip(shard, members, STORE)
    with pytest.raises(ValueError, match="missing"):
        read_json(shard, none, STORE)
    with pytest.raises(ValueError, match="expected an object"):
        read_json(shard, listed, STORE)


@given(total=st.integers(1, 500), faulty=st.integers(0, 500), limit=st.floats(0, 1))
def test_the_share_of_faults(total, faulty, limit):
    faults = [Fault(f"k{i}", "why.") for i in range(faulty)]
    if faulty <= limit * total:
        check_fault_share(faults, total, limit, "here")
    else:
        with pytest.raises(ValueError, match=f"{faulty} of {total} items in here") as raised:
            check_fault_share(faults, total, limit, "here")
        assert ".." not in str(raised.value)


def test_equal_settings_in_another_order_are_equal(tmp_path):
    pairs = [("a", 1), ("b", [1, 2]), ("c", None)]
    random.Random(0).shuffle(pairs)
    assert ShardFolder(tmp_path, dict(pairs)).hash == ShardFolder(tmp_path, dict(sorted(pairs))).hash
