"""What of a clip is packed: buckets, windows, scenes, duplicates; and the plan of the shards."""

import json
from collections import Counter

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from data.bucket import Bucket
from data.pack.command import pack
from data.pack.plan import cut, make_plan
from data.pack.windows import WINDOWS, Cutting, window_indices
from data.synth.command import synth
from data.video.decode import decode_video
from data.video.write import write_video

SMALL = ["7x32x32"]


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
    for path in made.glob("clip-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def run(src, out, **options):
    pack(str(src), out, **{"buckets": SMALL, "processes": 1, **options})
    return json.loads((out / "index.json").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def samples(out):
    """All samples of all shards, as webdataset reads them."""
    shards = [str(out / shard["name"]) for shard in json.loads((out / "index.json").read_text())["shards"]]
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


def moving(frames, size=32, start=0):
    """Frames that all differ: (T, H, W, 3)."""
    video = np.zeros((frames, size, size, 3), np.uint8)
    for t in range(frames):
        video[t, :, :, 0] = (start + 6 * t) % 250
        video[t, : size // 2, t % size :, 1] = 200
    return video


rows = st.lists(
    st.tuples(
        st.text("ab-w01", min_size=1, max_size=4),
        st.integers(0, 3000),  # bytes of the clip
        st.integers(0, 6),  # content
        st.lists(st.sampled_from([*SMALL, "13x32x32"]), max_size=3),
    ),
    max_size=40,
)


def test_clips_go_to_the_bucket_that_fits(clips, tmp_path):
    write_video(clips / "clip-000002.mp4", moving(14), 12)
    write_video(clips / "clip-000003.mp4", np.repeat(moving(8), 2, axis=2), 12)
    index = run(clips, tmp_path / "out", buckets=["13x32x32", "7x32x32", "7x32x64"])
    assert index["buckets"] == {
        "7x32x32": {"samples": 5, "shards": 1},
        "7x32x64": {"samples": 1, "shards": 1},
        "13x32x32": {"samples": 1, "shards": 1},
    }
    assert {json.loads(s["json"])["bucket"] for s in samples(tmp_path / "out") if s["__key__"].endswith("2")} == {
        "13x32x32"
    }


def test_windows():
    small, long = Bucket(7, 32, 32), Bucket(13, 32, 32)
    times = np.arange(40) / 10
    at = {"times": times, "height": 32, "width": 32}
    assert Cutting((small, long)).windows(**at) == [(long, list(range(13)))]
    assert Cutting((small,), window="middle").windows(**at) == [(small, list(range(16, 23)))]
    every = Cutting((long,), window="all").windows(**at)
    assert [indices[0] for _, indices in every] == [0, 13, 26] and every[2][1][-1] == 38
    assert Cutting((small,), fps=5).windows(**at) == [(small, list(range(0, 13, 2)))]
    assert [w[0] for _, w in Cutting((small,), fps=5, window="all").windows(**at)] == [0, 14]
    [(_, middle)] = Cutting((small,), fps=5, window="middle").windows(**at)
    assert middle == list(range(middle[0], middle[0] + 13, 2)) and middle[0] in (13, 14)
    # 13 frames last 6 s at 2 fps: only the short bucket is left.
    assert Cutting((small, long), fps=2).windows(**at) == [(small, list(range(0, 31, 5)))]
    assert Cutting((small,), fps=1).windows(**at) == []
    scenes = Cutting((small, long), scene_threshold=0.3).windows(**at, cuts=[0.5, 1.4])
    assert scenes == [(small, list(range(5, 12))), (long, list(range(14, 27)))]
    assert Cutting((Bucket(7, 64, 64),)).windows(**at) == []
    assert Cutting((Bucket(7, 64, 64),), upscale=True).windows(**at) == [(Bucket(7, 64, 64), list(range(7)))]


@pytest.mark.parametrize("frames", [37, 38, 300, 1000])
@pytest.mark.parametrize("rate", [24.0, 30000 / 1001, 24000 / 1001])
@pytest.mark.parametrize("window", WINDOWS)
def test_at_a_clips_own_rate_no_frame_comes_twice_or_is_passed_over(frames, rate, window):
    times = np.round(np.arange(frames) / rate * 90_000) / 90_000  # as containers keep them
    found = Cutting((Bucket(19, 64, 64),), rate, window).windows(times, 64, 64)
    assert len(found) == (frames // 19 if window == "all" else 1)
    for _, indices in found:
        assert indices == list(range(indices[0], indices[0] + 19))


def test_a_long_clip_gives_windows_that_show_the_same_pictures(tmp_path):
    source = tmp_path / "clips" / "long.mp4"
    write_video(source, moving(60), 12)
    source.with_suffix(".txt").write_text("a bar")
    run(tmp_path / "clips", tmp_path / "all", window="all", shard_samples=5)
    seen = samples(tmp_path / "all")
    assert [sample["__key__"] for sample in seen] == [f"long--w{i:03d}" for i in range(8)]
    whole = decode_video(source)
    for number, sample in enumerate(seen):
        indices = json.loads(sample["json"])["indices"]
        np.testing.assert_array_equal(decode_video(sample["mp4"], indices), whole[7 * number : 7 * number + 7])
    assert len(seen[0]["mp4"]) < source.stat().st_size  # only what is used is kept
    assert json.loads(seen[0]["json"])["frames"] < 60


def test_windows_are_encoded_at_the_buckets_size_if_asked(tmp_path):
    source = tmp_path / "clips" / "long.mov"
    write_video(tmp_path / "long.mp4", moving(30, size=48), 12)
    source.parent.mkdir()
    (tmp_path / "long.mp4").rename(source)
    source.with_suffix(".txt").write_text("a bar")
    run(tmp_path / "clips", tmp_path / "out", reencode=True, fps=6.0)
    [sample] = samples(tmp_path / "out")
    facts = json.loads(sample["json"])
    assert (facts["frames"], facts["fps"], facts["height"], facts["width"]) == (7, 6.0, 32, 32)
    assert facts["indices"] == list(range(7)) and "mp4" in sample
    want = decode_video(source, range(0, 13, 2), 32, 32).astype(int)
    assert np.abs(decode_video(sample["mp4"]).astype(int) - want).mean() < 8


def test_scenes_become_samples(tmp_path):
    source = tmp_path / "clips" / "two.mp4"
    video = np.concatenate([np.full((10, 32, 32, 3), 20, np.uint8), np.full((12, 32, 32, 3), 230, np.uint8)])
    write_video(source, video, 12)
    source.with_suffix(".txt").write_text("dark, then light")
    run(tmp_path / "clips", tmp_path / "out", split_scenes=True)
    seen = samples(tmp_path / "out")
    assert [sample["__key__"] for sample in seen] == ["two--w000", "two--w001"]
    means = [decode_video(s["mp4"], json.loads(s["json"])["indices"]).mean() for s in seen]
    assert means[0] < 60 and means[1] > 190


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_duplicates_are_reported_and_dropped_if_asked(clips, tmp_path, duplicates, capsys):
    (clips / "clip-000005.mp4").write_bytes((clips / "clip-000002.mp4").read_bytes())
    (clips / "clip-000001.mov").write_bytes((clips / "clip-000003.mp4").read_bytes())
    index = run(clips, tmp_path / "out", duplicates=duplicates)
    # By its path, clip-000001.mov comes before clip-000001.mp4, and has its key; it shows what clip-000003.mp4 does.
    assert lines(tmp_path / "out" / "duplicates.jsonl") == [
        {"key": key, "same_as": same, "kind": kind, "source": source, "first": first}
        for key, same, kind, source, first in [
            ("clip-000001", "clip-000001", "key", "clip-000001.mp4", "clip-000001.mov"),
            ("clip-000003", "clip-000001", "content", "clip-000003.mp4", "clip-000001.mov"),
            ("clip-000005", "clip-000002", "content", "clip-000005.mp4", "clip-000002.mp4"),
        ]
    ]
    assert index["samples"] == (7 if duplicates == "keep" else 5) and index["faults"] == 0
    assert Counter(s["__key__"] for s in samples(tmp_path / "out")).most_common(1)[0][1] == 1
    assert "2 of content, 1 of key" in capsys.readouterr().out


@given(rows=rows, shard_bytes=st.integers(1, 20_000), shard_samples=st.integers(1, 7), drop=st.booleans())
def test_a_plan_loses_nothing_keeps_the_order_and_its_bounds(rows, shard_bytes, shard_samples, drop):
    journal = []
    for number, (key, size, content, windows) in enumerate(rows):
        facts = {"frames": 7}
        row = {"key": key, "bytes": size, "facts": facts, "caption": "é", "sha256": f"{content:064x}",
               "windows": [[name, list(range(7))] for name in windows]}  # fmt: skip
        journal.append((number // 256, number, row if windows else {"key": key, "fault": "broken"}))
    buckets = [Bucket.parse(name) for name in (*SMALL, "13x32x32")]
    plan = make_plan(
        journal, buckets, shard_bytes=shard_bytes, shard_samples=shard_samples, drop_duplicates=drop
    )  # fmt: skip
    usable = [(number, row) for _, number, row in journal if "windows" in row]
    planned = {bucket: [s for b, part in plan.shards.values() if b == bucket for s in part] for bucket in buckets}
    seen = [(s.offset, s.window) for part in planned.values() for s in part]
    assert len(seen) == len(set(seen)) == plan.samples
    for bucket, part in planned.items():
        assert [s.key for s in part] == sorted(s.key for s in part)
        for sample in part:
            assert rows[sample.offset][3][sample.window] == bucket.name
    for name, (bucket, part) in plan.shards.items():
        assert name.startswith(f"{bucket.name}-") and 1 <= len(part) <= shard_samples
        assert len(part) == 1 or sum(s.bytes for s in part) <= shard_bytes
    numbers = {bucket: [name for name, (b, _) in plan.shards.items() if b == bucket] for bucket in buckets}
    for bucket, names in numbers.items():
        assert names == [f"{bucket.name}-{i:06d}.tar" for i in range(len(names))]
    # What is not there is reported: keys that are taken, and content if that is to be dropped.
    keys = [s.key for part in planned.values() for s in part]
    assert len(keys) == len(set(keys))
    left_out = [d for d in plan.duplicates if d.kind == "key" or drop]
    if not left_out:
        assert len(seen) == sum(len(row["windows"]) for _, row in usable)
    first_of = {}
    for number, row in usable:
        first_of.setdefault(row["key"], number)
    if not drop:
        clash = {d.key for d in plan.duplicates if d.kind == "key"}
        for key, number in first_of.items():
            want = {(number, w) for w in range(len(rows[number][3])) if f"{key}--w{w:03d}" not in clash}
            assert want <= set(seen)


def test_a_clip_may_be_called_like_the_window_of_another():
    rows = [
        (0, number, {"key": key, "bytes": 9, "facts": {"frames": 7}, "caption": "", "sha256": f"{number:064x}",
                     "windows": [["7x32x32", list(range(7))]] * count})
        for number, (key, count) in enumerate([("a", 2), ("a--w001", 1)])
    ]  # fmt: skip
    plan = make_plan(rows, [Bucket(7, 32, 32)], shard_bytes=10**6, shard_samples=9)
    [(_, planned)] = plan.shards.values()
    assert [(s.key, s.offset, s.window) for s in planned] == [("a--w000", 0, 0), ("a--w001", 1, 0)]
    assert plan.duplicates == [("a--w001", "a--w001", "key", (0, 0), (0, 1))]


@given(sizes=st.lists(st.integers(0, 100)), limit=st.integers(1, 300), count=st.integers(1, 9))
def test_cutting_into_shards(sizes, limit, count):
    parts = list(cut(sizes, limit, count))
    assert [i for part in parts for i in part] == list(range(len(sizes)))
    for part, following in zip(parts, [*parts[1:], None], strict=False):
        total = sum(sizes[i] for i in part)
        assert len(part) <= count and (total <= limit or len(part) == 1)
        if following is not None:  # no shard is smaller than it has to be
            assert len(part) == count or total + sizes[following.start] > limit


@pytest.mark.slow
@pytest.mark.parametrize("reencode", [False, True])
def test_every_window_keeps_the_caption_and_the_picture_of_its_clip(tmp_path, reencode):
    """Clips are cut ahead of the loop that writes them: what belongs to one must not come with another."""
    (tmp_path / "clips").mkdir()
    for i in range(50):
        # A clip's number is its brightness.
        write_video(tmp_path / "clips" / f"{i:02d}.mp4", np.full((24, 32, 32, 3), 5 * i, np.uint8), 12)
        (tmp_path / "clips" / f"{i:02d}.txt").write_text(f"number {i}")
    run(tmp_path / "clips", tmp_path / "out", reencode=reencode, shard_samples=20, processes=2)
    found = samples(tmp_path / "out")
    assert [s["__key__"] for s in found] == [f"{i:02d}" for i in range(50)]
    for i, sample in enumerate(found):
        facts = json.loads(sample["json"])
        assert sample["txt"] == f"number {i}".encode() and facts["source"] == f"{i:02d}.mp4"
        assert abs(decode_video(sample["mp4"], facts["indices"]).mean() - 5 * i) < 4


REGULAR = np.arange(30) / 24


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ((4,), [0, 1, 2, 3]),
        ((4, None, 10 / 24), [10, 11, 12, 13]),
        ((4, None, 10.4 / 24), [10, 11, 12, 13]),
        ((4, 12), [0, 2, 4, 6]),
        ((4, 12, 3 / 24), [3, 5, 7, 9]),
        ((3, 10), [0, 2, 5]),  # 0, 2.4, 4.8
        ((4, 48), [0, 0, 1, 1]),  # of two frames equally near, the earlier
        ((15, 12, 1 / 24), list(range(1, 30, 2))),  # to the very end
        ((15, 12, 2 / 24), None),
        ((30,), list(range(30))),
        ((31,), None),
        ((1, None, 29.4 / 24), [29]),
        ((1, None, 29.6 / 24), None),
    ],
)
def test_windows_of_a_regular_clip(arguments, expected):
    assert window_indices(REGULAR, *arguments) == expected


def test_windows_follow_the_times_of_a_clip_whose_rate_varies():
    times = np.array([0.0, 0.1, 0.2, 0.25, 0.3, 0.6, 0.61, 0.62, 0.9, 1.0])
    assert window_indices(times, 4, 10) == [0, 1, 2, 4]
    assert window_indices(times, 4, 10, 0.4) == [4, 5, 5, 7]  # 0.4, 0.5, 0.6, 0.7
    assert window_indices(times, 11, 10) == [0, 1, 2, 4, 4, 5, 5, 7, 8, 8, 9]
    assert window_indices(times, 12, 10) is None
    assert window_indices(np.zeros(1), 1, 24) == [0]
    assert window_indices(np.zeros(1), 2, 24) is None


@pytest.mark.parametrize("arguments", [(0,), (3, 0), (3, -1), (3, float("nan")), (3, 24, -0.1)])
def test_windows_that_make_no_sense(arguments):
    with pytest.raises(ValueError, match="expected frames >= 1, fps > 0, start >= 0"):
        window_indices(REGULAR, *arguments)
