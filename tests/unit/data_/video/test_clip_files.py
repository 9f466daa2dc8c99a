"""Clips written with PyAV and read with decord; windows of their frames."""

import numpy as np
import pytest

from data.video.clip_files import (
    VideoInfo,
    cover,
    decode_video,
    frame_times,
    probe_times,
    probe_video,
    window_indices,
    write_video,
)
from tests.support import broken_clips


def moving_bar(frames: int = 7, height: int = 48, width: int = 64) -> np.ndarray:
    video = np.full((frames, height, width, 3), (30, 60, 120), dtype=np.uint8)
    for t in range(frames):
        video[t, :, 4 + 6 * t : 16 + 6 * t] = (230, 200, 40)
    return video


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "bar.mp4"
    write_video(path, moving_bar(), fps=12)
    return path


def test_what_is_written_is_read_again(clip):
    got = decode_video(clip)
    assert got.shape == (7, 48, 64, 3) and got.dtype == np.uint8
    assert np.abs(got.astype(int) - moving_bar()).mean() < 4  # colours, geometry and order survive yuv420p
    assert probe_video(clip) == VideoInfo(
        frames=7,
        fps=12.0,
        height=48,
        width=64,
        codec="h264",
        duration=pytest.approx(7 / 12),
        rotation=0,
        variable=False,
    )


@pytest.mark.parametrize("width", [16, 32, 40, 48, 66, 96, 100, 144, 176, 240])
def test_rows_of_any_width_are_read(tmp_path, width):
    video = moving_bar(frames=3, height=32, width=width)
    write_video(tmp_path / "narrow.mp4", video, fps=12)
    for source in (tmp_path / "narrow.mp4", (tmp_path / "narrow.mp4").read_bytes()):
        got = decode_video(source, 2)
        assert got.shape == (2, 32, width, 3)
        assert np.abs(got.astype(int) - video[:2]).mean() < 4
        assert probe_video(source).width == width


def test_bytes_and_files_read_alike_and_only_the_first_frames(clip):
    assert np.array_equal(decode_video(clip.read_bytes(), 4), decode_video(clip)[:4])
    assert probe_video(clip.read_bytes()) == probe_video(clip)


def test_the_same_frames_give_the_same_bytes(clip, tmp_path):
    write_video(tmp_path / "again.mp4", moving_bar(), fps=12)
    assert (tmp_path / "again.mp4").read_bytes() == clip.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"bar.mp4", "again.mp4"}  # nothing is left beside


def test_the_bytes_do_not_depend_on_what_lies_in_the_memory(tmp_path):
    """x264 with AVX-512 read what earlier encoders had left there; most of all with its slower settings."""
    seen: dict[str, set[bytes]] = {"fast": set(), "slow": set()}
    for size in range(16, 76, 2):
        write_video(tmp_path / "other.mp4", moving_bar(height=size, width=112 - size), fps=12)
        write_video(tmp_path / "fast.mp4", moving_bar(frames=12, height=64), fps=12)
        broken_clips.write_clip(tmp_path / "slow.mp4", broken_clips.scene())
        for name, contents in seen.items():
            contents.add((tmp_path / f"{name}.mp4").read_bytes())
    assert {name: len(contents) for name, contents in seen.items()} == {"fast": 1, "slow": 1}


def test_other_sizes_are_covered_and_cropped_about_the_centre():
    video = np.zeros((2, 40, 80, 3), dtype=np.uint8)
    video[:, :, 20:60] = 255  # the middle square is white
    assert (cover(video, 20, 20)[:, :, 1:-1] == 255).all()
    assert cover(video, 40, 80) is video
    assert cover(video, 30, 31).shape == (2, 30, 31, 3)
    constant = np.full((1, 33, 47, 3), 77, dtype=np.uint8)
    assert (cover(constant, 64, 16) == 77).all()


def test_decoding_to_another_size(clip):
    assert decode_video(clip, 3, 32, 32).shape == (3, 32, 32, 3)


@pytest.mark.parametrize(
    "keep, reason", [(0, r"is empty \(0 bytes\)"), (40, "cannot be decoded .*cut short"), (700, "cannot be decoded")]
)
def test_a_damaged_clip_is_named(clip, tmp_path, keep, reason):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"broken\.mp4 {reason}"):
        decode_video(broken)
    with pytest.raises(ValueError, match=f"clip of {keep} bytes {reason}"):
        probe_video(broken.read_bytes())


def test_a_clip_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.mp4 cannot be decoded \(no such file or directory\)"):
        probe_video(tmp_path / "gone.mp4")


def test_a_clip_whose_end_is_missing_is_refused_and_the_message_is_short(clip):
    cut = clip.read_bytes()[:-20]
    for read in (probe_video, decode_video):
        with pytest.raises(ValueError, match="its container promises 7 frames, 6 can be read") as caught:
            read(cut)
        assert "/src/" not in str(caught.value) and len(str(caught.value)) < 200


def test_damage_behind_the_frames_that_are_asked_for_does_not_matter_nor_change_them(clip):
    for _ in range(5):  # decord decodes ahead, and would meet the damage in some runs
        assert np.array_equal(decode_video(clip.read_bytes()[:-20], 6), decode_video(clip, 6))


def test_a_short_clip_is_refused(clip):
    with pytest.raises(ValueError, match="has 7 frames, expected at least 8"):
        decode_video(clip, 8)
    with pytest.raises(ValueError, match="has 7 frames, expected at least 10"):
        decode_video(clip, [2, 9])
    for none in (0, [], [-1]):
        with pytest.raises(ValueError, match="expected at least one, numbered from 0"):
            decode_video(clip, none)


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


def test_probing_gives_the_times_too(clip):
    info, times = probe_times(clip)
    assert info == probe_video(clip)
    assert np.allclose(times, np.arange(7) / 12) and np.array_equal(times, frame_times(clip))


def test_frames_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "x.mp4", moving_bar(height=47), fps=12)
    for wrong in (moving_bar()[0], moving_bar().astype(np.float32), moving_bar()[:0]):
        with pytest.raises(ValueError, match="got frames"):
            write_video(tmp_path / "x.mp4", wrong, fps=12)
    assert not list(tmp_path.iterdir())
