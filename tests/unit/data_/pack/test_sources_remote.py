"""Clips from stores and archives: what is remote, refused, damaged, or hangs."""

import contextlib
import functools
import http.server
import io
import json
import os
import re
import signal
import tarfile
import threading
from pathlib import Path

import pytest

from data.pack.command import pack
from data.pack.entries import Columns
from data.pack.sources import open_source
from data.storage.store import Store
from data.synth.command import synth

SMALL = ["7x32x32"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    synth(folder, clips=4, frames=7, size=32)
    return folder


@pytest.fixture
def clip(made):
    return lambda i: (made / f"clip-{i:06d}.mp4").read_bytes()


@pytest.fixture
def served(tmp_path):
    """A folder, and its address on a local HTTP server."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Ranges(http.server.SimpleHTTPRequestHandler):
        """Answers requests for a part of a file, as stores do."""

        def do_GET(self):
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            path = Path(self.translate_path(self.path))
            if asked is None or not path.is_file():
                return super().do_GET()
            content = path.read_bytes()
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            self.wfile.write(content[first : last + 1])

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranges, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def entries(location, tmp_path, columns=Columns(), **options):  # noqa: B008 - frozen
    source = open_source(str(location), columns, Store(attempts=1), tmp_path / "work", **options)
    return list(source.entries())


def packed(src, out, **options):
    """Key -> (caption, clip) of what was packed, and key -> reason of what was not."""
    pack(str(src), out, **{"buckets": SMALL, "processes": 1, "max_fault_share": 1.0, **options})
    found = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as archive:
            for member in archive:
                found[member.name] = archive.extractfile(member).read()
    keys = [name.removesuffix(".txt") for name in found if name.endswith(".txt")]
    faults = [json.loads(line) for line in (out / "faults.jsonl").read_text().splitlines()]
    return {key: (found[f"{key}.txt"].decode(), found[f"{key}.mp4"]) for key in keys}, {
        fault["key"]: f"{fault['shard'].rpartition('/')[2]}: {fault['reason']}" for fault in faults
    }


def write_tar(path, members):
    """An archive with members of any name: (name, bytes) or a TarInfo."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            archive.addfile(info, io.BytesIO(member[1]))


# -- tables ----------------------------------------------------------------------------------------------------------


def write_table(path, rows, names=("clip", "caption")):
    import csv

    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in rows))
    else:
        import pyarrow
        from pyarrow import parquet

        columns = list(zip(*rows, strict=True))
        parquet.write_table(pyarrow.table(dict(zip(names, columns, strict=True))), path)
    return path


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
    found, faults = packed(f"{address}/table.parquet", tmp_path / "out")
    assert dict(found.values()) == {
        "absolute": clip(0), "relative": clip(1), "with a query": clip(2), "with another": clip(2)
    }  # fmt: skip
    assert {"clips--0", "clips--1"} < set(found)
    assert "404" in faults["clips--9"] or "9.mp4" in faults["clips--9"]
    assert "remote" in faults["row-000006"] and "remote" in faults["row-000007"]
    assert len(faults) == 3


def test_what_a_store_did_not_give_is_asked_for_again_until_the_survey_is_done(tmp_path, served, clip):
    folder, address = served
    (folder / "0.mp4").write_bytes(clip(0))
    table = write_table(tmp_path / "t.csv", [(f"{address}/{i}.mp4", "fine") for i in range(2)])
    with pytest.raises(ValueError, match=r"1 of 2 items .*1: .*/1\.mp4 cannot be read"):
        packed(table, tmp_path / "out", max_fault_share=0.1)
    (folder / "1.mp4").write_bytes(clip(1))
    found, faults = packed(table, tmp_path / "out", max_fault_share=0.1)
    assert sorted(found) == ["0", "1"] and not faults
    (folder / "1.mp4").unlink()
    assert sorted(packed(table, tmp_path / "other")[0]) == ["0"]
    (folder / "1.mp4").write_bytes(clip(1))
    # What is decided stays: shards that exist may not change under their readers.
    assert sorted(packed(table, tmp_path / "other")[0]) == ["0"]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="finds the process of a connection in /proc")
def test_a_clip_that_hangs_or_ends_its_process_costs_itself(tmp_path, made, clip):
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
    rows = [(f"{made}/clip-{i:06d}.mp4", "fine") for i in range(3)]
    rows[1:1] = [(f"{address}/hang.mp4", "hangs")]
    rows[3:3] = [(f"{address}/crash.mp4", "crashes")]
    try:
        found, faults = packed(write_table(tmp_path / "t.csv", rows), tmp_path / "out", deadline=3.0)
    finally:
        done.set()
        server.shutdown()
        thread.join()
        server.server_close()
    assert [content for _, content in found.values()] == [clip(i) for i in range(3)]
    assert list(faults) == ["hang", "crash"]
    assert "longer than 3" in faults["hang"] and "signal 11" in faults["crash"]


# -- archives --------------------------------------------------------------------------------------------------------


def test_archives_by_braces_wildcards_and_url(tmp_path, served, clip):
    folder, address = served
    for shard in range(2):
        members = []
        for i in range(2):
            members += [(f"{i}.mp4", clip(2 * shard + i)), (f"{i}.txt", f"{shard}{i}".encode())]
        write_tar(folder / f"s-{shard}.tar", members)
    want = {f"s-{shard}--{i}": (f"{shard}{i}", clip(2 * shard + i)) for shard in range(2) for i in range(2)}
    for number, location in enumerate((f"{folder}/s-*.tar", f"{folder}/s-{{0..1}}.tar", f"{address}/s-{{0..1}}.tar")):
        found, faults = packed(location, tmp_path / str(number))
        assert found == want and not faults
    found, _ = packed(folder / "s-0.tar", tmp_path / "one")
    assert list(found) == ["0", "1"]
    with pytest.raises(ValueError, match="matches nothing"):
        packed(f"{folder}/t-*.tar", tmp_path / "none")


def test_what_an_archive_must_not_hold_is_named_and_never_touches_the_disk(tmp_path, clip):
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
    found, faults = packed(tmp_path / "s.tar", tmp_path / "out")
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


def test_damaged_archives_cost_what_lies_behind_the_damage(tmp_path, clip):
    members = [(f"{i}.{e}", c) for i in range(3) for e, c in (("mp4", clip(i)), ("txt", b"fine"))]
    write_tar(tmp_path / "whole.tar", members)
    content = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as archive:
        place = {member.name: member for member in archive}
    (tmp_path / "s-cut.tar").write_bytes(content[: place["2.mp4"].offset_data + 100])
    (tmp_path / "s-header.tar").write_bytes(content[: place["1.mp4"].offset + 200])
    (tmp_path / "s-noise.tar").write_bytes(b"noise" * 999)
    (tmp_path / "s-zero.tar").write_bytes(b"")
    found, faults = packed(f"{tmp_path}/s-{{cut,header,noise,zero,gone}}.tar", tmp_path / "out")
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
            packed(location, tmp_path / "refused")
    assert not mark.exists() and not (tmp_path / "refused").exists()
    found, _ = packed(f"pipe:cat {tmp_path}/s.tar", tmp_path / "out", allow_pipe=True)
    assert found == {"a": ("fine", clip(0))}
    # No shell reads it: what would be a second command is an argument.
    with pytest.raises(ValueError, match=r"cat|none of"):
        packed(f"pipe:cat {tmp_path}/s.tar; touch {mark}", tmp_path / "shell", allow_pipe=True)
    assert not mark.exists()


def test_what_an_archive_holds_is_read_once(tmp_path, clip, monkeypatch):
    write_tar(tmp_path / "s.tar", [("a.mp4", clip(0)), ("a.txt", b"fine")])
    first = entries(tmp_path / "s.tar", tmp_path)

    def fail(*_):
        raise AssertionError("its headers are read again")

    monkeypatch.setattr("data.pack.sources.scan_tar", fail)
    assert entries(tmp_path / "s.tar", tmp_path) == first
    write_tar(tmp_path / "s.tar", [("b.mp4", clip(0)), ("b.txt", b"another")])
    with pytest.raises(AssertionError, match="again"):
        entries(tmp_path / "s.tar", tmp_path)
