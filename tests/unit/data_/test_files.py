"""Files are complete or absent, whatever happens while they are written."""

import errno
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data import files
from data.files import (
    append_line,
    atomic_file,
    atomic_folder,
    temporaries,
    temporary_path,
    write_bytes_once,
    write_json,
    write_text,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_old_one_and_its_folder_is_made(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "old")
    write_text(path, "néw\n")
    assert path.read_bytes() == "néw\n".encode() and names(path.parent) == ["b.txt"]


def test_json_is_indented_or_compact(tmp_path):
    write_json(tmp_path / "a.json", {"ä": [1]})
    write_json(tmp_path / "b.json", {"ä": [1]}, compact=True)
    assert (tmp_path / "a.json").read_text() == '{\n "ä": [\n  1\n ]\n}\n'
    assert (tmp_path / "b.json").read_text() == '{"ä":[1]}\n'


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_after_a_failure_the_old_file_stands_alone(tmp_path, error):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def fail() -> None:
        with atomic_file(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise error("here")

    with pytest.raises(error, match="here"):
        fail()
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        order.append(os.path.isdir(f"/proc/self/fd/{descriptor}") and "sync folder" or "sync file")
        fsync(descriptor)

    def record_replace(old, new) -> None:
        order.append("rename")
        replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    write_text(tmp_path / "a.txt", "x")
    assert order == ["sync file", "rename", "sync folder"]
    order.clear()
    with atomic_file(tmp_path / "b.txt", durable=False) as temporary:
        temporary.write_text("x")
    assert order == ["rename"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_only_a_file_system_that_cannot_sync_folders_is_excused(tmp_path, monkeypatch, code):
    sync = files.sync

    def fail_for_folders(path: Path) -> None:
        if path.is_dir():
            raise OSError(code, os.strerror(code))
        sync(path)

    monkeypatch.setattr(files, "sync", fail_for_folders)
    if code == errno.EIO:
        with pytest.raises(OSError, match="Input/output"):
            write_text(tmp_path / "a.txt", "x")
    else:
        write_text(tmp_path / "a.txt", "x")
    assert (tmp_path / "a.txt").read_text() == "x"


def test_temporary_names_are_found_and_no_others(tmp_path):
    one, two = temporary_path(tmp_path / "a.tar"), temporary_path(tmp_path / "b.tar")
    assert one != temporary_path(tmp_path / "a.tar") and one.parent == tmp_path
    for path in (one, two, tmp_path / "a.tar", tmp_path / ".a.tar", tmp_path / "a.part"):
        path.touch()
    assert temporaries(tmp_path) == sorted([one, two])
    assert temporaries(tmp_path, "a.tar") == [one]
    assert temporaries(tmp_path / "absent") == []


def test_a_folder_appears_complete(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as temporary:
        write_text(temporary / "inner" / "a.txt", "x")
        assert not out.exists()
    assert (out / "inner" / "a.txt").read_text() == "x" and names(out.parent) == ["out"]


def test_a_folder_that_failed_or_was_killed_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    killed = temporary_path(out)
    killed.mkdir()
    (killed / "half").touch()

    def fail() -> None:
        with atomic_folder(out) as temporary:
            (temporary / "half").touch()
            raise ValueError("here")

    with pytest.raises(ValueError, match="here"):
        fail()
    assert names(tmp_path) == []


def test_a_folder_replaces_no_other(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").touch()
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "new").touch()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["kept"]


def test_lines_are_appended_and_a_half_line_swallows_none(tmp_path):
    path = tmp_path / "a.jsonl"
    append_line(path, '{"a": 1}')
    with path.open("a") as file:
        file.write('{"half')
    append_line(path, '{"b": 2}')
    append_line(path, '{"c": 3}')
    lines = path.read_text().splitlines()
    assert [json.loads(lines[i]) for i in (0, 2, 3)] == [{"a": 1}, {"b": 2}, {"c": 3}] and lines[1] == '{"half'


def test_of_several_writers_at_once_the_first_ones_content_stays(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "a"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_bytes_once(path, bytes([i]) * 1000), range(8)))
    kept = path.read_bytes()
    assert len(kept) == 1000 and len(set(kept)) == 1 and names(path.parent) == ["a"]

    def no_links(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    write_bytes_once(path, b"later")
    write_bytes_once(path.with_name("b"), b"new")
    assert path.read_bytes() == kept and path.with_name("b").read_bytes() == b"new"
    assert names(path.parent) == ["a", "b"]
