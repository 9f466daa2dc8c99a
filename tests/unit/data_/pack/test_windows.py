"""Which frames of a clip are packed: buckets, windows, scenes; and duplicates."""

import json
from collections import Counter

import numpy as np
import pytest

from data.bucket import Bucket
from data.pack.windows import WINDOWS, WindowSettings, window_indices
from data.video.decode import decode_video
from data.video.write import write_video
from tests.support.drawn_clips import changing_frames
from tests.support.packing import pack_small, read_lines, read_shards

REGULAR = np.arange(30) / 24


def test_clips_go_to_the_bucket_that_fits(clips, tmp_path):
    write_video(clips / "clip-000002.mp4", changing_frames(14), 12)
    write_video(clips / "clip-000003.mp4", np.repeat(changing_frames(8), 2, axis=2), 12)
    index = pack_small(clips, tmp_path / "out", buckets=["13x32x32", "7x32x32", "7x32x64"])
    assert index["buckets"] == {
        "7x32x32": {"samples": 5, "shards": 1},
        "7x32x64": {"samples": 1, "shards": 1},
        "13x32x32": {"samples": 1, "shards": 1},
    }
    assert {json.loads(s["json"])["bucket"] for s in read_shards(tmp_path / "out") if s["__key__"].endswith("2")} == {
        "13x32x32"
    }


def test_windows():
    small, long = Bucket(7, 32, 32), Bucket(13, 32, 32)
    times = np.arange(40) / 10
    at = {"times": times, "height": 32, "width": 32}
    assert WindowSettings((small, long)).windows(**at) == [(long, list(range(13)))]
    assert WindowSettings((small,), window="middle").windows(**at) == [(small, list(range(16, 23)))]
    every = WindowSettings((long,), window="all").windows(**at)
    assert [indices[0] for _, indices in every] == [0, 13, 26] and every[2][1][-1] == 38
    assert WindowSettings((small,), fps=5).windows(**at) == [(small, list(range(0, 13, 2)))]
    assert [w[0] for _, w in WindowSettings((small,), fps=5, window="all").windows(**at)] == [0, 14]
    [(_, middle)] = WindowSettings((small,), fps=5, window="middle").windows(**at)
    assert middle == list(range(middle[0], middle[0] + 13, 2)) and middle[0] in (13, 14)
    # 13 frames last 6 s at 2 fps: only the short bucket is left.
    assert WindowSettings((small, long), fps=2).windows(**at) == [(small, list(range(0, 31, 5)))]
    assert WindowSettings((small,), fps=1).windows(**at) == []
    scenes = WindowSettings((small, long), scene_threshold=0.3).windows(**at, cuts=[0.5, 1.4])
    assert scenes == [(small, list(range(5, 12))), (long, list(range(14, 27)))]
    assert WindowSettings((Bucket(7, 64, 64),)).windows(**at) == []
    assert WindowSettings((Bucket(7, 64, 64),), upscale=True).windows(**at) == [(Bucket(7, 64, 64), list(range(7)))]


@pytest.mark.parametrize("frames", [37, 38, 300, 1000])
@pytest.mark.parametrize("rate", [24.0, 30000 / 1001, 24000 / 1001])
@pytest.mark.parametrize("window", WINDOWS)
def test_at_a_clips_own_rate_every_frame_is_used_once(frames, rate, window):
    times = np.round(np.arange(frames) / rate * 90_000) / 90_000  # as containers round them
    found = WindowSettings((Bucket(19, 64, 64),), rate, window).windows(times, 64, 64)
    assert len(found) == (frames // 19 if window == "all" else 1)
    for _, indices in found:
        assert indices == list(range(indices[0], indices[0] + 19))


def test_the_windows_of_a_long_clip_show_its_frames(tmp_path):
    source = tmp_path / "clips" / "long.mp4"
    write_video(source, changing_frames(60), 12)
    source.with_suffix(".txt").write_text("a bar")
    pack_small(tmp_path / "clips", tmp_path / "all", window="all", shard_samples=5)
    seen = read_shards(tmp_path / "all")
    assert [sample["__key__"] for sample in seen] == [f"long--w{i:03d}" for i in range(8)]
    whole = decode_video(source)
    for number, sample in enumerate(seen):
        indices = json.loads(sample["json"])["indices"]
        np.testing.assert_array_equal(decode_video(sample["mp4"], indices), whole[7 * number : 7 * number + 7])
    assert len(seen[0]["mp4"]) < source.stat().st_size  # only the window is packed
    assert json.loads(seen[0]["json"])["frames"] < 60


def test_reencoded_windows_have_the_buckets_size(tmp_path):
    source = tmp_path / "clips" / "long.mov"
    write_video(tmp_path / "long.mp4", changing_frames(30, size=48), 12)
    source.parent.mkdir()
    (tmp_path / "long.mp4").rename(source)
    source.with_suffix(".txt").write_text("a bar")
    pack_small(tmp_path / "clips", tmp_path / "out", reencode=True, fps=6.0)
    [sample] = read_shards(tmp_path / "out")
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
    pack_small(tmp_path / "clips", tmp_path / "out", split_scenes=True)
    seen = read_shards(tmp_path / "out")
    assert [sample["__key__"] for sample in seen] == ["two--w000", "two--w001"]
    means = [decode_video(s["mp4"], json.loads(s["json"])["indices"]).mean() for s in seen]
    assert means[0] < 60 and means[1] > 190


@pytest.mark.parametrize("duplicates", ["keep", "drop"])
def test_duplicates_are_reported_and_dropped_if_asked(clips, tmp_path, duplicates, capsys):
    (clips / "clip-000005.mp4").write_bytes((clips / "clip-000002.mp4").read_bytes())
    (clips / "clip-000001.mov").write_bytes((clips / "clip-000003.mp4").read_bytes())
    index = pack_small(clips, tmp_path / "out", duplicates=duplicates)
    # By its path, clip-000001.mov comes before clip-000001.mp4, and has its key; it shows what clip-000003.mp4 does.
    assert read_lines(tmp_path / "out" / "duplicates.jsonl") == [
        {"key": key, "same_as": same, "kind": kind, "source": source, "first": first}
        for key, same, kind, source, first in [
            ("clip-000001", "clip-000001", "key", "clip-000001.mp4", "clip-000001.mov"),
            ("clip-000003", "clip-000001", "content", "clip-000003.mp4", "clip-000001.mov"),
            ("clip-000005", "clip-000002", "content", "clip-000005.mp4", "clip-000002.mp4"),
        ]
    ]
    assert index["samples"] == (7 if duplicates == "keep" else 5) and index["faults"] == 0
    assert Counter(s["__key__"] for s in read_shards(tmp_path / "out")).most_common(1)[0][1] == 1
    assert "2 of content, 1 of key" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("reencode", [False, True])
def test_every_window_keeps_the_caption_and_the_picture_of_its_clip(tmp_path, reencode):
    """Windows are cut ahead of the loop that writes them; a window must not get the caption of another clip."""
    (tmp_path / "clips").mkdir()
    for i in range(50):
        # A clip's number is its brightness.
        write_video(tmp_path / "clips" / f"{i:02d}.mp4", np.full((24, 32, 32, 3), 5 * i, np.uint8), 12)
        (tmp_path / "clips" / f"{i:02d}.txt").write_text(f"number {i}")
    pack_small(tmp_path / "clips", tmp_path / "out", reencode=reencode, shard_samples=20, processes=2)
    found = read_shards(tmp_path / "out")
    assert [s["__key__"] for s in found] == [f"{i:02d}" for i in range(50)]
    for i, sample in enumerate(found):
        facts = json.loads(sample["json"])
        assert sample["txt"] == f"number {i}".encode() and facts["source"] == f"{i:02d}.mp4"
        assert abs(decode_video(sample["mp4"], facts["indices"]).mean() - 5 * i) < 4


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
def test_invalid_windows_are_refused(arguments):
    with pytest.raises(ValueError, match="expected frames >= 1, fps > 0, start >= 0"):
        window_indices(REGULAR, *arguments)
