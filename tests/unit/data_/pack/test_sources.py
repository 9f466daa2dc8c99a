"""Where clips come from: folders, tables and archives, and what is refused, missing or damaged in each."""

import functools
import http.server
import json
import re
import tarfile
import threading
from pathlib import Path

import pytest

from data.pack.command import pack
from data.pack.entries import Columns
from data.pack.sources import open_source
from data.pack.survey import list_source
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


# -- folders ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_searched_in_depth_and_in_order(tmp_path):
    names = [
        "b/x.MP4",
        "a/x.v2.mp4",
        "a/deep/y.webm",
        ".hidden/y.mp4",
        "a/.part.mp4",
        "z.gif",
        "ä b.avi",
        "c.mp4/d.m4v",
    ]
    for name in names:
        path = tmp_path / "src" / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.touch()
        path.with_suffix(".txt").write_text(name)
    found = entries(tmp_path / "src", tmp_path)
    assert [(entry.key, entry.extension, entry.source) for entry in found] == [
        ("a--deep--y", "webm", "a/deep/y.webm"),
        ("a--x_v2", "mp4", "a/x.v2.mp4"),
        ("b--x", "mp4", "b/x.MP4"),
        ("c_mp4--d", "m4v", "c.mp4/d.m4v"),
        ("ä b", "avi", "ä b.avi"),
    ]
    assert [entry.read_caption(Store()) for entry in found] == [entry.source for entry in found]


def test_captions_in_json_beside_a_clip(tmp_path, clip):
    notes = {0: {"caption": " one "}, 1: {"text": "two"}, 2: {"caption": 3}, 3: ["caption"], 4: {"caption": "\ud800"}}
    for i, note in notes.items():
        (tmp_path / f"c{i}.mp4").write_bytes(clip(i % 4))
        (tmp_path / f"c{i}.json").write_text(json.dumps(note))
    found, faults = packed(tmp_path, tmp_path / "out")
    assert found == {"c0": ("one", clip(0))} and sorted(faults) == ["c1", "c2", "c3", "c4"]
    assert "['text']" in faults["c1"] and "'caption'" in faults["c2"] and "list" in faults["c3"]
    found, _ = packed(tmp_path, tmp_path / "other", columns=Columns(caption_field="text"))
    assert found == {"c1": ("two", clip(1))}


def test_names_that_are_no_unicode(tmp_path, clip):
    folder = tmp_path / "src"
    folder.mkdir()
    for name, caption in ((b"caf\xe9.mp4", b"fine"), (b"bad\xff.mp4", None)):
        path = bytes(folder) + b"/" + name
        with open(path, "wb") as file:
            file.write(clip(0))
        if caption is not None:
            with open(path[:-3] + b"txt", "wb") as file:
                file.write(caption)
    found, faults = packed(folder, tmp_path / "out")
    assert found == {"caf\\udce9": ("fine", clip(0))}
    assert list(faults) == ["bad\\udcff"] and "no caption" in faults["bad\\udcff"]


@pytest.mark.parametrize(
    "name, said", [("none", "neither a folder"), ("empty", "holds no clip"), ("x.parq", "neither")]
)
def test_nothing_to_pack(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parq").touch()
    with pytest.raises(ValueError, match=said):
        packed(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_listing_changes_with_what_is_in_it(tmp_path, clip):
    def digest():
        return list_source(open_source(str(tmp_path / "src"), Columns(), Store(), tmp_path)).digest

    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "a.mp4").write_bytes(clip(0))
    seen = [digest()]
    for change in (
        lambda: (tmp_path / "src" / "a.txt").write_text("one"),
        lambda: (tmp_path / "src" / "a.txt").write_text("three"),
        lambda: (tmp_path / "src" / "a.mp4").write_bytes(clip(0) + b"\0"),
        lambda: (tmp_path / "src" / "b.mp4").write_bytes(clip(1)),
        lambda: (tmp_path / "src" / "a.mp4").rename(tmp_path / "src" / "c.mp4"),
    ):
        change()
        assert digest() not in seen
        seen.append(digest())
    assert digest() == seen[-1]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_tables(tmp_path, made, clip, suffix):
    rows = [
        (f"{made}/clip-000003.mp4", "caption, 3\nin two lines"),
        ("sub/../here.mp4", "né"),
        ("gone.mp4", "nothing"),
        ("pipe:cat here.mp4", "a command"),
        ("here.gif", "a picture"),
        ("", "no clip"),
    ]
    (tmp_path / "here.mp4").write_bytes(clip(0))
    table = write_table(tmp_path / f"table{suffix}", rows)
    found, faults = packed(table, tmp_path / "out")
    inside = f"{made}/clip-000003".strip("/").replace("/", "--").replace(".", "_")
    assert found == {inside: ("caption, 3\nin two lines", clip(3)), "here": ("né", clip(0))}
    assert all(reason.startswith(f"table{suffix}: ") for reason in faults.values())
    assert sorted(faults) == ["gone", "here", "row-000004", "row-000006"]
    assert "a command" in faults["row-000004"] and ".gif" in faults["here"]
    other = write_table(tmp_path / f"other{suffix}", rows, ("file", "text"))
    with pytest.raises(ValueError, match=r"has columns \['file', 'text'\], expected 'clip' and 'caption'"):
        packed(other, tmp_path / "other")
    found, _ = packed(other, tmp_path / "named", columns=Columns(clip="file", caption="text"))
    assert len(found) == 2


def test_rows_that_are_none(tmp_path, clip):
    (tmp_path / "a.mp4").write_bytes(clip(0))
    good = b'{"clip": "a.mp4", "caption": "one"}'
    rows = [good, b'{"clip": "b.mp4", "capt', b'{"clip": "c.mp4", "caption": "caf\xe9"}', b"[1]", b'{"clip": "d.mp4"}',
            b'{"clip": 3, "caption": "x"}', b'{"clip": "e.mp4", "caption": 5}', b"\x00" * 40,
            b'{"clip": "n\\u0000.mp4", "caption": "x"}']  # fmt: skip
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(rows))
    found, faults = packed(tmp_path / "t.jsonl", tmp_path / "out")
    assert found == {"a": ("one", clip(0))}
    assert list(faults) == ["row-000002", "row-000003", "row-000004", "d", "row-000006", "e", "row-000008", "n\0"]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfclip,caption\na.mp4,one\nb.mp4,caf\xe9\nc.mp4\n")
    found, faults = packed(tmp_path / "t.csv", tmp_path / "csv")
    assert found == {"a": ("one", clip(0))}
    assert "not UTF-8" in faults["b"] and "no caption in row 3" in faults["c"]


def test_a_parquet_table_without_pyarrow(tmp_path, monkeypatch):
    import sys

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not Parquet"):
        packed(tmp_path / "t.parquet", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'reblock\[parquet\]'"):
        packed(tmp_path / "t.parquet", tmp_path / "out")


def test_a_quote_left_open_does_not_swallow_the_rows_behind_it(tmp_path, made):
    rows = [f"{made}/clip-{i:06d}.mp4,caption {i}" for i in range(3)]
    rows[1] = rows[1].replace("caption", '"caption')
    (tmp_path / "table.csv").write_text("clip,caption\n" + "\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="is not CSV"):
        packed(tmp_path / "table.csv", tmp_path / "out")


def test_a_first_row_without_a_caption_costs_itself(tmp_path, made):
    rows = [{"clip": f"{made}/clip-000000.mp4"}, {"clip": f"{made}/clip-000001.mp4", "caption": "there"}]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    packed(tmp_path / "table.jsonl", tmp_path / "out", max_fault_share=0.5)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["samples"] == 1


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, clip):
    for name, content in (("a", "hello"), ("b", json.dumps({"caption": "hello"}))):
        (tmp_path / f"{name}.mp4").write_bytes(clip(0))
        (tmp_path / f"{name}{'.txt' if name == 'a' else '.json'}").write_text(content, encoding="utf-8-sig")
    store = Store()
    assert [entry.read_caption(store) for entry in entries(tmp_path, tmp_path)] == ["hello", "hello"]


def test_what_a_folder_holds_besides_is_counted(tmp_path, clip, capsys):
    (tmp_path / "src" / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.ts", "more/c.TS", "more/d"):
        (tmp_path / "src" / name).write_bytes(clip(0))
    (tmp_path / "src" / "a.txt").write_text("hello")
    (tmp_path / "src" / "link").symlink_to(tmp_path / "src" / "more", target_is_directory=True)
    packed(tmp_path / "src", tmp_path / "out")
    assert "passed over: 2 files .ts, 1 linked folders, 1 files ." in capsys.readouterr().out
