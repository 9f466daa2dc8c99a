"""Clips written with PyAV and read with decord."""

import numpy as np
import pytest

from data.video import VideoInfo, cover, decode_video, probe_video, write_video


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
    assert probe_video(clip) == VideoInfo(frames=7, fps=12.0, height=48, width=64)


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


@pytest.mark.parametrize("keep", [0, 40, 700])
def test_a_damaged_clip_is_named(clip, tmp_path, keep):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(clip.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"broken\.mp4 cannot be decoded"):
        decode_video(broken)
    with pytest.raises(ValueError, match=f"clip of {keep} bytes cannot be decoded"):
        probe_video(broken.read_bytes())


def test_a_clip_whose_end_is_missing_fails_where_it_is_decoded_and_the_message_is_short(clip):
    with pytest.raises(ValueError, match="cannot be decoded") as caught:
        decode_video(clip.read_bytes()[:-20])
    assert "/src/" not in str(caught.value) and len(str(caught.value)) < 300


def test_damage_behind_the_frames_that_are_asked_for_does_not_matter_nor_change_them(clip):
    for _ in range(5):  # decord decodes ahead, and meets the damage in some runs
        assert np.array_equal(decode_video(clip.read_bytes()[:-20], 6), decode_video(clip, 6))
        assert probe_video(clip.read_bytes()[:-20]).frames == 7


def test_a_short_clip_is_refused(clip):
    with pytest.raises(ValueError, match="has 7 frames, expected at least 8"):
        decode_video(clip, 8)


def test_frames_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "x.mp4", moving_bar(height=47), fps=12)
    for wrong in (moving_bar()[0], moving_bar().astype(np.float32), moving_bar()[:0]):
        with pytest.raises(ValueError, match="got frames"):
            write_video(tmp_path / "x.mp4", wrong, fps=12)
    assert not list(tmp_path.iterdir())
