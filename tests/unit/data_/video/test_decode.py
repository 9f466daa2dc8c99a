"""Frames of clips: which are read, in which size, and which clips are refused."""

import numpy as np
import pytest

from data.video.decode import cover, decode_video
from data.video.probe import probe_video
from data.video.write import write_video
from tests.support.drawn_clips import moving_bar


@pytest.mark.parametrize("width", [16, 32, 40, 48, 66, 96, 100, 144, 176, 240])
def test_rows_of_any_width_are_read(tmp_path, width):
    video = moving_bar(frames=3, height=32, width=width)
    write_video(tmp_path / "narrow.mp4", video, fps=12)
    for source in (tmp_path / "narrow.mp4", (tmp_path / "narrow.mp4").read_bytes()):
        got = decode_video(source, 2)
        assert got.shape == (2, 32, width, 3)
        assert np.abs(got.astype(int) - video[:2]).mean() < 4
        assert probe_video(source).width == width


def test_bytes_and_files_give_the_same_frames(clip):
    assert np.array_equal(decode_video(clip.read_bytes(), 4), decode_video(clip)[:4])
    assert probe_video(clip.read_bytes()) == probe_video(clip)


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


def test_a_clip_without_its_end_is_refused_with_a_short_message(clip):
    cut = clip.read_bytes()[:-20]
    for read in (probe_video, decode_video):
        with pytest.raises(ValueError, match="its container promises 7 frames, 6 can be read") as caught:
            read(cut)
        assert "/src/" not in str(caught.value) and len(str(caught.value)) < 200


def test_damage_after_the_requested_frames_does_not_change_them(clip):
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
