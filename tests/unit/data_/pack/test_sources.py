"""Clips from folders and tables: which are found, and which are refused, missing or damaged."""

import json

import pytest

from data.pack.entries import Columns
from data.pack.listing import summarize
from data.pack.sources import open_source
from data.storage.store import Store
from tests.support.packing import pack_all, write_table


def entries(location, tmp_path):
    return list(open_source(str(location), Columns(), Store(attempts=1), tmp_path / "work").entries())


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
    found, faults = pack_all(tmp_path, tmp_path / "out")
    assert found == {"c0": ("one", clip(0))} and sorted(faults) == ["c1", "c2", "c3", "c4"]
    assert "['text']" in faults["c1"] and "'caption'" in faults["c2"] and "list" in faults["c3"]
    found, _ = pack_all(tmp_path, tmp_path / "other", columns=Columns(caption_field="text"))
    assert found == {"c1": ("two", clip(1))}


def test_names_that_are_not_unicode(tmp_path, clip):
    folder = tmp_path / "src"
    folder.mkdir()
    for name, caption in ((b"caf\xe9.mp4", b"fine"), (b"bad\xff.mp4", None)):
        path = bytes(folder) + b"/" + name
        with open(path, "wb") as file:
            file.write(clip(0))
        if caption is not None:
            with open(path[:-3] + b"txt", "wb") as file:
                file.write(caption)
    found, faults = pack_all(folder, tmp_path / "out")
    assert found == {"caf\\udce9": ("fine", clip(0))}
    assert list(faults) == ["bad\\udcff"] and "no caption" in faults["bad\\udcff"]


@pytest.mark.parametrize(
    "name, said", [("none", "neither a folder"), ("empty", "holds no clip"), ("x.parq", "neither")]
)
def test_a_source_without_clips_is_refused(tmp_path, name, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.parq").touch()
    with pytest.raises(ValueError, match=said):
        pack_all(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_digest_changes_with_the_files_of_the_source(tmp_path, clip):
    def digest():
        return summarize(open_source(str(tmp_path / "src"), Columns(), Store(), tmp_path)).digest

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
def test_tables(tmp_path, synthetic_clips, clip, suffix):
    rows = [
        (f"{synthetic_clips}/clip-000003.mp4", "caption, 3\nin two lines"),
        ("sub/../here.mp4", "né"),
        ("gone.mp4", "nothing"),
        ("pipe:cat here.mp4", "a command"),
        ("here.gif", "a picture"),
        ("", "no clip"),
    ]
    (tmp_path / "here.mp4").write_bytes(clip(0))
    table = write_table(tmp_path / f"table{suffix}", rows)
    found, faults = pack_all(table, tmp_path / "out")
    inside = f"{synthetic_clips}/clip-000003".strip("/").replace("/", "--").replace(".", "_")
    assert found == {inside: ("caption, 3\nin two lines", clip(3)), "here": ("né", clip(0))}
    assert all(reason.startswith(f"table{suffix}: ") for reason in faults.values())
    assert sorted(faults) == ["gone", "here", "row-000004", "row-000006"]
    assert "a command" in faults["row-000004"] and ".gif" in faults["here"]
    other = write_table(tmp_path / f"other{suffix}", rows, ("file", "text"))
    with pytest.raises(ValueError, match=r"has columns \['file', 'text'\], expected 'clip' and 'caption'"):
        pack_all(other, tmp_path / "other")
    found, _ = pack_all(other, tmp_path / "named", columns=Columns(clip="file", caption="text"))
    assert len(found) == 2


def test_damaged_rows_are_faults(tmp_path, clip):
    (tmp_path / "a.mp4").write_bytes(clip(0))
    good = b'{"clip": "a.mp4", "caption": "one"}'
    rows = [good, b'{"clip": "b.mp4", "capt', b'{"clip": "c.mp4", "caption": "caf\xe9"}', b"[1]", b'{"clip": "d.mp4"}',
            b'{"clip": 3, "caption": "x"}', b'{"clip": "e.mp4", "caption": 5}', b"\x00" * 40,
            b'{"clip": "n\\u0000.mp4", "caption": "x"}']  # fmt: skip
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(rows))
    found, faults = pack_all(tmp_path / "t.jsonl", tmp_path / "out")
    assert found == {"a": ("one", clip(0))}
    assert list(faults) == ["row-000002", "row-000003", "row-000004", "d", "row-000006", "e", "row-000008", "n\0"]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfclip,caption\na.mp4,one\nb.mp4,caf\xe9\nc.mp4\n")
    found, faults = pack_all(tmp_path / "t.csv", tmp_path / "csv")
    assert found == {"a": ("one", clip(0))}
    assert "not UTF-8" in faults["b"] and "no caption in row 3" in faults["c"]


def test_a_parquet_table_without_pyarrow(tmp_path, monkeypatch):
    import sys

    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="is not Parquet"):
        pack_all(tmp_path / "t.parquet", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'reblock\[parquet\]'"):
        pack_all(tmp_path / "t.parquet", tmp_path / "out")


def test_an_unclosed_quote_is_an_error(tmp_path, synthetic_clips):
    rows = [f"{synthetic_clips}/clip-{i:06d}.mp4,caption {i}" for i in range(3)]
    rows[1] = rows[1].replace("caption", '"caption')
    (tmp_path / "table.csv").write_text("clip,caption\n" + "\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="is not CSV"):
        pack_all(tmp_path / "table.csv", tmp_path / "out")


def test_a_first_row_without_a_caption_costs_itself(tmp_path, synthetic_clips):
    rows = [
        {"clip": f"{synthetic_clips}/clip-000000.mp4"},
        {"clip": f"{synthetic_clips}/clip-000001.mp4", "caption": "there"},
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pack_all(tmp_path / "table.jsonl", tmp_path / "out", max_fault_share=0.5)
    assert json.loads((tmp_path / "out" / "index.json").read_text())["samples"] == 1


def test_a_byte_order_mark_is_no_part_of_a_caption(tmp_path, clip):
    for name, content in (("a", "hello"), ("b", json.dumps({"caption": "hello"}))):
        (tmp_path / f"{name}.mp4").write_bytes(clip(0))
        (tmp_path / f"{name}{'.txt' if name == 'a' else '.json'}").write_text(content, encoding="utf-8-sig")
    store = Store()
    assert [entry.read_caption(store) for entry in entries(tmp_path, tmp_path)] == ["hello", "hello"]


def test_other_files_of_a_folder_are_counted(tmp_path, clip, capsys):
    (tmp_path / "src" / "more").mkdir(parents=True)
    for name in ("a.mp4", "b.ts", "more/c.TS", "more/d"):
        (tmp_path / "src" / name).write_bytes(clip(0))
    (tmp_path / "src" / "a.txt").write_text("hello")
    (tmp_path / "src" / "link").symlink_to(tmp_path / "src" / "more", target_is_directory=True)
    pack_all(tmp_path / "src", tmp_path / "out")
    assert "passed over: 2 files .ts, 1 linked folders, 1 files ." in capsys.readouterr().out
