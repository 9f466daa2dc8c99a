"""Archives, indices and records of shards."""

import json
import tarfile

import pytest
import webdataset

from data.shards import (
    LATENT_FORMAT,
    VIDEO_FORMAT,
    Fault,
    ShardFolder,
    check_fault_share,
    list_samples,
    read_index,
    read_member,
    write_tar,
)

SAMPLES = [{"__key__": f"clip-{i}", "bin": bytes([i]) * (1 + 700 * i), "txt": f"caption é {i}"} for i in range(3)]


def test_members_are_read_in_place(tmp_path):
    path = tmp_path / "a.tar"
    entry = write_tar(path, SAMPLES)
    listed = list_samples(path)
    assert list(listed) == ["clip-0", "clip-1", "clip-2"]
    for sample in SAMPLES:
        assert read_member(path, listed[sample["__key__"]]["bin"]) == sample["bin"]
        assert read_member(path, listed[sample["__key__"]]["txt"]).decode() == sample["txt"]
    assert entry["samples"] == 3 and entry["bytes"] == path.stat().st_size


def test_webdataset_reads_them_and_equal_samples_give_equal_bytes(tmp_path):
    first = write_tar(tmp_path / "a.tar", SAMPLES)
    second = write_tar(tmp_path / "b.tar", SAMPLES)
    assert first["sha256"] == second["sha256"]
    seen = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(s["__key__"], s["bin"]) for s in seen] == [(s["__key__"], s["bin"]) for s in SAMPLES]


def test_a_failed_write_leaves_the_old_archive_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, SAMPLES)
    before = path.read_bytes()

    def failing():
        yield SAMPLES[0]
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        write_tar(path, failing())
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("keep", [100, 700, 2000])
def test_a_truncated_archive_is_named(tmp_path, keep):
    path = tmp_path / "a.tar"
    write_tar(path, SAMPLES[2:])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"a\.tar is not a whole tar archive"):
        list_samples(path)


def test_paths_longer_than_the_old_tar_format_allows(tmp_path):
    key = "k" * 180
    write_tar(tmp_path / "a.tar", [{"__key__": key, "bin": b"x"}])
    assert list(list_samples(tmp_path / "a.tar")) == [key]
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert archive.getnames() == [f"{key}.bin"]


def finished_folder(path, settings=None):
    folder = ShardFolder(path, settings or {"frames": 7})
    faults = [Fault("clip-9", "broken")]
    folder.write("shard-000000.tar", SAMPLES[:2], faults)
    assert folder.finish(["shard-000000.tar", "shard-000001.tar"], {"format": VIDEO_FORMAT}) is None
    assert not (path / "index.json").exists()
    folder.write("shard-000001.tar", SAMPLES[2:], [])
    return folder.finish(["shard-000000.tar", "shard-000001.tar"], {"format": VIDEO_FORMAT})


def test_the_index_is_written_when_all_shards_are_there(tmp_path):
    index = finished_folder(tmp_path)
    assert read_index(tmp_path, VIDEO_FORMAT) == index
    assert (index["samples"], index["faults"], [s["samples"] for s in index["shards"]]) == (3, 1, [2, 1])
    assert json.loads((tmp_path / "faults.jsonl").read_text()) == {"key": "clip-9", "reason": "broken"}


def test_shards_of_other_settings_are_refused_and_the_difference_is_named(tmp_path):
    finished_folder(tmp_path)
    assert ShardFolder(tmp_path, {"frames": 7}).finished("shard-000000.tar")["entry"]["samples"] == 2
    with pytest.raises(ValueError, match=r"other settings \(there, now\): {'frames': \(7, 13\)}"):
        ShardFolder(tmp_path, {"frames": 13}).finished("shard-000000.tar")
    (tmp_path / "shard-000000.tar").unlink()
    assert ShardFolder(tmp_path, {"frames": 7}).finished("shard-000000.tar") is None


def test_faults_of_an_index(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_index(tmp_path / "none", LATENT_FORMAT)
    with pytest.raises(ValueError, match=r"has no index\.json"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match="has format 'other', expected"):
        read_index(tmp_path)
    (tmp_path / "index.json").unlink()
    finished_folder(tmp_path)
    with pytest.raises(ValueError, match="Encode them first with `reblock encode`"):
        read_index(tmp_path, LATENT_FORMAT)
    (tmp_path / "shard-000001.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks \['shard-000001.tar'\] of its 2 shards"):
        read_index(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps({"format": VIDEO_FORMAT, "shards": []}))
    with pytest.raises(ValueError, match="lists no sample"):
        read_index(tmp_path)


def test_the_share_of_faults():
    faults = [Fault(f"clip-{i}", "too short") for i in range(2)]
    check_fault_share(faults, 200, 0.01, "folder")
    with pytest.raises(ValueError, match=r"2 of 199 items in folder .* clip-0: too short"):
        check_fault_share(faults, 199, 0.01, "folder")
