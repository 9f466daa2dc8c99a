"""Clips from stores and archives: what is remote, refused, damaged, or hangs."""

import contextlib
import http.server
import os
import signal
import tarfile
import threading
from pathlib import Path

import pytest

from data.pack.entries import Columns
from data.pack.sources import open_source
from data.storage.store import Store
from tests.support.http_store import WebStore
from tests.support.packing import pack_all, write_table, write_tar


@pytest.fixture
def served(tmp_path):
    """A folder, and its address on a local HTTP server."""
    folder = tmp_path / "served"
    folder.mkdir()
    with WebStore(folder) as store:
        yield folder, store.url


def entries(location, tmp_path):
    return list(open_source(str(location), Columns(), Store(attempts=1), tmp_path / "work").entries())


def process_of(port):
    """The process that has a TCP connection from a local port."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inode = next(row[9] for row in rows if int(row[1].split(":")[1], 16) == port)
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == f"socket:[{inode}]":
                return int(link.parts[2])
    raise AssertionError(f"no process has port {port}")


def test_urls_and_a_remote_table(tmp_path, served, clip):
    folder, address = served
    (folder / "clips").mkdir()
    for i in range(3):
        (folder / "clips" / f"{i}.mp4").write_bytes(clip(i))
    rows = [
        (f"{address}/clips/0.mp4", "absolute"),
        ("clips/1.mp4", "relative"),
        (f"{address}/clips/2.mp4?version=1", "with a query"),
        (f"{address}/clips/2.mp4?version=2", "with another"),
        (f"{address}/clips/9.mp4", "absent"),
        ("/etc/hostname.mp4", "of this machine"),
        ("../clips/0.mp4", "out of its folder"),
    ]
    write_table(folder / "table.parquet", rows)
    found, faults = pack_all(f"{address}/table.parquet", tmp_path / "out")
    assert dict(found.values()) == {
        "absolute": clip(0), "relative": clip(1), "with a query": clip(2), "with another": clip(2)
    }  # fmt: skip
    assert {"clips--0", "clips--1"} < set(found)
    assert "404" in faults["clips--9"] or "9.mp4" in faults["clips--9"]
    assert "remote" in faults["row-000006"] and "remote" in faults["row-000007"]
    assert len(faults) == 3


def test_clips_that_a_store_failed_to_return_are_retried_until_the_journal_is_complete(tmp_path, served, clip):
    folder, address = served
    (folder / "0.mp4").write_bytes(clip(0))
    table = write_table(tmp_path / "t.csv", [(f"{address}/{i}.mp4", "fine") for i in range(2)])
    with pytest.raises(ValueError, match=r"1 of 2 items .*1: .*/1\.mp4 cannot be read"):
        pack_all(table, tmp_path / "out", max_fault_share=0.1)
    (folder / "1.mp4").write_bytes(clip(1))
    found, faults = pack_all(table, tmp_path / "out", max_fault_share=0.1)
    assert sorted(found) == ["0", "1"] and not faults
    (folder / "1.mp4").unlink()
    assert sorted(pack_all(table, tmp_path / "other")[0]) == ["0"]
    (folder / "1.mp4").write_bytes(clip(1))
    # A complete journal stays as it is: existing shards may have readers.
    assert sorted(pack_all(table, tmp_path / "other")[0]) == ["0"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds the process of a connection in /proc")
def test_a_clip_that_hangs_or_ends_its_process_costs_itself(tmp_path, synthetic_clips, clip):
    """Its bytes come from a server that never answers, or ends the process that asks it, as a broken decoder would."""
    done = threading.Event()

    class Hostile(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if "crash" in self.path:
                os.kill(process_of(self.client_address[1]), signal.SIGSEGV)
            done.wait(60)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    rows = [(f"{synthetic_clips}/clip-{i:06d}.mp4", "fine") for i in range(3)]
    rows[1:1] = [(f"{address}/hang.mp4", "hangs")]
    rows[3:3] = [(f"{address}/crash.mp4", "crashes")]
    try:
        found, faults = pack_all(write_table(tmp_path / "t.csv", rows), tmp_path / "out", deadline=3.0)
    finally:
        done.set()
        server.shutdown()
        thread.join()
        server.server_close()
    assert [content for _, content in found.values()] == [clip(i) for i in range(3)]
    assert list(faults) == ["hang", "crash"]
    assert "longer than 3" in faults["hang"] and "signal 11" in faults["crash"]


def test_archives_by_braces_wildcards_and_url(tmp_path, served, clip):
    folder, address = served
    for shard in range(2):
        members = []
        for i in range(2):
            members += [(f"{i}.mp4", clip(2 * shard + i)), (f"{i}.txt", f"{shard}{i}".encode())]
        write_tar(folder / f"s-{shard}.tar", members)
    want = {f"s-{shard}--{i}": (f"{shard}{i}", clip(2 * shard + i)) for shard in range(2) for i in range(2)}
    for number, location in enumerate((f"{folder}/s-*.tar", f"{folder}/s-{{0..1}}.tar", f"{address}/s-{{0..1}}.tar")):
        found, faults = pack_all(location, tmp_path / str(number))
        assert found == want and not faults
    found, _ = pack_all(folder / "s-0.tar", tmp_path / "one")
    assert list(found) == ["0", "1"]
    with pytest.raises(ValueError, match="matches nothing"):
        pack_all(f"{folder}/t-*.tar", tmp_path / "none")


def test_forbidden_members_of_an_archive_are_named_and_never_written(tmp_path, clip):
    link = tarfile.TarInfo("linked.mp4")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    members = [
        ("good.mp4", clip(0)), ("good.txt", b"fine"), ("good.cls", b"3"),
        ("code.pyd", b"x"), ("code.mp4", clip(1)), ("code.txt", b"also fine"), ("weights.pt", b"x"), ("w.pkl", b"x"),
        ("/etc/absolute.mp4", clip(1)), ("../outside.mp4", clip(1)), ("a/../../outside.txt", b"x"), link,
        ("silent.mp4", clip(1)), ("blind.txt", b"no clip"), ("two.mp4", clip(1)), ("two.avi", clip(1)),
        ("latin.mp4", clip(1)), ("latin.txt", b"caf\xe9"), ("noted.mp4", clip(2)), ("noted.json", b'{"caption": "n"}'),
    ]  # fmt: skip
    write_tar(tmp_path / "s.tar", members)
    found, faults = pack_all(tmp_path / "s.tar", tmp_path / "out")
    assert found == {"good": ("fine", clip(0)), "code": ("also fine", clip(1)), "noted": ("n", clip(2))}
    assert all(reason.startswith("s.tar: ") for reason in faults.values())
    said = {
        "code_pyd": "hold code", "weights_pt": "hold code", "w_pkl": "hold code", "etc--absolute_mp4": "absolute",
        "__--outside_mp4": "leads out", "a--__--__--outside_txt": "leads out", "linked_mp4": "link",
        "silent": "no caption", "blind": "expected one of mp4", "two": "expected one of mp4", "latin": "not UTF-8",
    }  # fmt: skip
    assert set(faults) == set(said)
    for key, reason in said.items():
        assert reason in faults[key], key
    assert not list(tmp_path.rglob("*outside*")) and not list(tmp_path.rglob("*absolute*"))


def test_a_damaged_archive_costs_the_samples_behind_the_damage(tmp_path, clip):
    members = [(f"{i}.{e}", c) for i in range(3) for e, c in (("mp4", clip(i)), ("txt", b"fine"))]
    write_tar(tmp_path / "whole.tar", members)
    content = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        place = {member.name: member for member in archive}
    (tmp_path / "s-cut.tar").write_bytes(content[: place["2.mp4"].offset_data + 100])
    (tmp_path / "s-header.tar").write_bytes(content[: place["1.mp4"].offset + 200])
    (tmp_path / "s-noise.tar").write_bytes(b"noise" * 999)
    (tmp_path / "s-zero.tar").write_bytes(b"")
    found, faults = pack_all(f"{tmp_path}/s-{{cut,header,noise,zero,gone}}.tar", tmp_path / "out")
    assert list(found) == ["s-cut--0", "s-cut--1", "s-header--0"]
    assert set(faults) == {"s-cut--2"} & set(faults) | {
        f"s-{n}_tar" for n in ("cut", "header", "noise", "zero", "gone")
    }
    assert "is cut" in faults["s-cut_tar"] and "is cut" in faults["s-header_tar"] and "0 bytes" in faults["s-zero_tar"]
    assert "not exist" in faults["s-gone_tar"]


def test_commands_run_only_if_allowed(tmp_path, clip):
    write_tar(tmp_path / "s.tar", [("a.mp4", clip(0)), ("a.txt", b"fine")])
    mark = tmp_path / "ran"
    for location in (f"pipe:cat {tmp_path}/s.tar", f"pipe:touch {mark}", f"touch {mark} |"):
        with pytest.raises(ValueError, match="allow_pipe"):
            pack_all(location, tmp_path / "refused")
    assert not mark.exists() and not (tmp_path / "refused").exists()
    found, _ = pack_all(f"pipe:cat {tmp_path}/s.tar", tmp_path / "out", allow_pipe=True)
    assert found == {"a": ("fine", clip(0))}
    # No shell reads it: what would be a second command is an argument.
    with pytest.raises(ValueError, match=r"cat|none of"):
        pack_all(f"pipe:cat {tmp_path}/s.tar; touch {mark}", tmp_path / "shell", allow_pipe=True)
    assert not mark.exists()


def test_the_headers_of_an_archive_are_read_once(tmp_path, clip, monkeypatch):
    write_tar(tmp_path / "s.tar", [("a.mp4", clip(0)), ("a.txt", b"fine")])
    first = entries(tmp_path / "s.tar", tmp_path)

    def fail(*_):
        raise AssertionError("its headers are read again")

    monkeypatch.setattr("data.pack.archive_source.scan_tar", fail)
    assert entries(tmp_path / "s.tar", tmp_path) == first
    write_tar(tmp_path / "s.tar", [("b.mp4", clip(0)), ("b.txt", b"another")])
    with pytest.raises(AssertionError, match="again"):
        entries(tmp_path / "s.tar", tmp_path)
