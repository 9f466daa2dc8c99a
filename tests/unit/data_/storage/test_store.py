"""Bytes from local files and from a real web server that fails for a while, for good, or lies."""

import multiprocessing
import os
from pathlib import Path

import fsspec
import pytest

from data.storage.store import Store, StoreError, check_location, expand, is_remote, join
from tests.support.http_store import WebStore

CONTENT = bytes(range(256)) * 40


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "a.tar").write_bytes(CONTENT)
    with WebStore(folder) as server:
        yield server


def quick(**options) -> Store:
    return Store(backoff=0.01, **options)


@pytest.mark.parametrize("offset, size", [(0, 10), (300, 700), (len(CONTENT) - 1, 1), (0, None), (17, None)])
def test_ranges_are_those_of_the_file(web, tmp_path, offset, size):
    expected = CONTENT[offset:] if size is None else CONTENT[offset : offset + size]
    local = str(tmp_path / "served" / "a.tar")
    for location in (local, f"file://{local}", f"{web.url}/a.tar"):
        assert quick().read(location, offset, size) == expected


def test_only_the_range_travels(web):
    quick().read(f"{web.url}/a.tar", 1000, 50)
    assert web.sent == 50


def test_a_range_behind_the_end_says_where_the_file_ends(web, tmp_path):
    for location in (str(tmp_path / "served" / "a.tar"), f"{web.url}/a.tar"):
        with pytest.raises(ValueError, match=f"ends at byte {len(CONTENT)}, expected {len(CONTENT) + 5}"):
            quick().read(location, len(CONTENT) - 5, 10)


def test_a_server_without_ranges_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(CONTENT)
    with WebStore(tmp_path, ranges=False) as web, pytest.raises(ValueError, match="ignores ranges"):
        quick().read(f"{web.url}/a.tar", 10, 10)


def test_a_store_that_fails_for_a_while_is_asked_again(web):
    web.fail("a.tar", 3)
    assert quick().read(f"{web.url}/a.tar", 5, 5) == CONTENT[5:10]
    assert web.asked["a.tar"] == 4


def test_a_store_that_fails_for_good_is_given_up_by_name(web):
    web.fail("a.tar")
    with pytest.raises(StoreError, match=r"a\.tar cannot be read after 3 attempt"):
        quick(attempts=3).read(f"{web.url}/a.tar", 5, 5)
    assert web.asked["a.tar"] == 3


def test_a_refusal_is_not_asked_again(web):
    web.fail("a.tar", status=403)
    with pytest.raises(StoreError, match="after 1 attempt"):
        quick().read(f"{web.url}/a.tar", 5, 5)
    with pytest.raises(StoreError, match="after 1 attempt"):
        quick().read(f"{web.url}/none.tar")


def test_sizes_and_absence(web, tmp_path):
    store = quick()
    assert store.size(f"{web.url}/a.tar") == len(CONTENT) and store.size(f"{web.url}/none") is None
    assert store.size(str(tmp_path / "none")) is None and not store.exists(str(tmp_path))
    web.fail("a.tar")
    with pytest.raises(StoreError):
        store.exists(f"{web.url}/a.tar")


def test_a_whole_remote_file_is_copied_and_removed(web, tmp_path):
    with quick().local(f"{web.url}/a.tar") as path:
        assert path.read_bytes() == CONTENT
    assert not path.exists()
    mine = tmp_path / "served" / "a.tar"
    with quick().local(str(mine)) as path:
        assert path == mine
    assert mine.exists()


# -- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_answers_for_the_store(web, tmp_path):
    store = quick(cache=tmp_path / "cache")
    first, again = (store.read(f"{web.url}/a.tar", 5, 50, version="1") for _ in range(2))
    assert first == again == CONTENT[5:55] and web.asked["a.tar"] == 1
    assert store.read(f"{web.url}/a.tar", 5, 51, version="1") == CONTENT[5:56]


def test_the_cache_knows_a_file_that_took_another_ones_name(web, tmp_path):
    store = quick(cache=tmp_path / "cache")
    store.read(f"{web.url}/a.tar", 5, 50, version="1")
    (tmp_path / "served" / "a.tar").write_bytes(CONTENT[::-1])
    assert store.read(f"{web.url}/a.tar", 5, 50, version="2") == CONTENT[::-1][5:55]
    store.read(f"{web.url}/a.tar", 60, 5)
    (tmp_path / "served" / "a.tar").write_bytes(CONTENT)
    assert store.read(f"{web.url}/a.tar", 60, 5) == CONTENT[60:65]  # of no version: never kept


def test_a_damaged_cache_entry_is_read_again(web, tmp_path):
    store = quick(cache=tmp_path / "cache")
    store.read(f"{web.url}/a.tar", 5, 50, version="1")
    (entry,) = (tmp_path / "cache").glob("??/*")
    entry.write_bytes(b"short")
    assert store.read(f"{web.url}/a.tar", 5, 50, version="1") == CONTENT[5:55]


def test_the_cache_is_bounded_and_keeps_what_was_used_last(web, tmp_path):
    store = quick(cache=tmp_path / "cache", cache_bytes=3200)
    for number in range(100):
        store.read(f"{web.url}/a.tar", number * 100, 100, version="1")
        store.read(f"{web.url}/a.tar", 0, 100, version="1")  # in use all the time
        for path in (tmp_path / "cache").glob("??/*"):  # file systems keep times too coarsely for this loop
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
        assert sum(p.stat().st_size for p in (tmp_path / "cache").glob("??/*")) <= 3200 + 3200 // 16
    asked = web.asked["a.tar"]
    store.read(f"{web.url}/a.tar", 0, 100, version="1")
    assert web.asked["a.tar"] == asked


def _read_in_child(store: Store, location: str, answers) -> None:
    answers.put(store.read(location, 10, 10))


def test_a_store_works_after_a_fork_and_in_a_spawned_process(web):
    store = quick()
    store.read(f"{web.url}/a.tar", 0, 1)  # its file system has a thread in this process by now
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        answers = context.SimpleQueue()
        child = context.Process(target=_read_in_child, args=(store, f"{web.url}/a.tar", answers))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert answers.get() == CONTENT[10:20]


# -- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "location", ["pipe:cat /etc/passwd", "|cat x", "cat x |", "ftp://host/a.tar", "simplecache::s3://b/a.tar"]
)
def test_commands_chains_and_unknown_schemes_are_refused(location):
    with pytest.raises(ValueError, match="got "):
        check_location(location)
    # No shards are read from a command: nothing is said of the flag that only `pack` has.
    with pytest.raises(ValueError, match=r"got (?!.*allow_pipe)"):
        expand(location)


def test_a_command_runs_only_if_allowed_and_without_a_shell(tmp_path):
    (tmp_path / "a b.tar").write_bytes(CONTENT)
    command = f"pipe:cat '{tmp_path}/a b.tar'"
    with pytest.raises(ValueError, match="allow_pipe"):
        with quick().local(command):
            pass
    with quick().local(command, allow_pipe=True) as path:
        assert path.read_bytes() == CONTENT
    with pytest.raises(OSError, match="ended with 1"):
        with quick().local(f"pipe:cat {tmp_path}/none > {tmp_path}/made", allow_pipe=True):
            pass
    assert not (tmp_path / "made").exists()


def test_braces_and_wildcards(tmp_path, monkeypatch):
    for name in ("b-000", "b-001", "a-000"):
        (tmp_path / f"{name}.tar").touch()
    here = str(tmp_path)
    assert expand(f"{here}/{{b,a}}-000.tar") == [f"{here}/b-000.tar", f"{here}/a-000.tar"]
    assert expand(f"{here}/*.tar") == [f"{here}/{n}.tar" for n in ("a-000", "b-000", "b-001")]
    assert expand("s3://bucket/x-{000..002}.tar") == [f"s3://bucket/x-00{i}.tar" for i in range(3)]
    assert expand("http://host/a.tar?version=1") == ["http://host/a.tar?version=1"]
    for wrong in (f"{here}/*.zip", f"{here}/{{a.tar"):
        with pytest.raises(ValueError, match="expected"):
            expand(wrong)


def test_wildcards_of_another_file_system():
    system = fsspec.filesystem("memory")
    for name in ("2.tar", "1.tar"):
        system.pipe_file(f"/shards/{name}", b"x" + name.encode())
    found = expand("memory://shards/*.tar")
    assert [location.rpartition("/")[2] for location in found] == ["1.tar", "2.tar"]
    assert [Store().read(location) for location in found] == [b"x1.tar", b"x2.tar"]
    assert is_remote(found[0]) and join("s3://b/f/", "a.tar") == "s3://b/f/a.tar"


def test_bounds():
    for wrong in ({"cache_bytes": 0}, {"attempts": 0}):
        with pytest.raises(ValueError, match="expected at least 1"):
            Store(**wrong)
    assert Path(join("/", "a")) == Path("/a")
