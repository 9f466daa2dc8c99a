"""Clips cut without encoding: the same frames at the same times, and nothing that is not needed."""

import numpy as np
import pytest

from data.video.decode import decode_video
from data.video.probe import probe_times, probe_video
from data.video.trim import clip_suffix, trim_video
from tests.support import broken_clips


@pytest.mark.parametrize("window", [(0, 6), (9, 15), (17, 19), (14, 14)])
@pytest.mark.parametrize(
    "name", ["h264", "h264-b-frames", "h264-open-gop", "hevc", "hevc-10-bit", "vp9", "av1", "transport-stream",
             "fragmented", "variable-rate", "rotated-90", "anamorphic", "matroska"]
)  # fmt: skip
def test_a_trimmed_clip_holds_the_same_frames_at_the_same_times(clip_of_kind, name, window):
    (first, last), path = window, clip_of_kind(name)
    content, index = trim_video(path, first, last)
    wanted = range(index, index + last - first + 1)
    assert np.array_equal(decode_video(content, wanted), decode_video(path, range(first, last + 1)))
    new, old = probe_times(content)[1][list(wanted)], probe_times(path)[1][first : last + 1]
    assert np.allclose(new - new[0], old - old[0], atol=1.1e-3)
    assert probe_video(content).codec == probe_video(path).codec and clip_suffix(content) == "mp4"
    assert len(decode_video(content)) == probe_video(content).frames  # nothing in it that needs what is left out
    assert trim_video(path.read_bytes(), first, last) == (content, index)


def test_trimming_drops_packets_that_are_not_needed(clip_of_kind):
    path = clip_of_kind("h264-open-gop")  # a key frame every eighth
    content, index = trim_video(path, 9, 10)
    assert index == 1 and probe_video(content).frames <= 6
    assert len(content) < 0.5 * path.stat().st_size


def test_trimming_keeps_codecs_that_mp4_does_not_hold(tmp_path):
    broken_clips.write_clip(tmp_path / "x.mkv", broken_clips.scene(), "ffv1")
    content, index = trim_video(tmp_path / "x.mkv", 13, 15)
    assert clip_suffix(content) == "mkv"
    assert trim_video(tmp_path / "x.mkv", 13, 15) == (content, index)  # nothing random in it
    assert np.array_equal(
        decode_video(content, range(index, index + 3)), decode_video(tmp_path / "x.mkv", [13, 14, 15])
    )


def test_clips_that_cannot_be_trimmed_are_refused(clip_of_kind):
    with pytest.raises(ValueError, match=r"frames 5 to 20; .* has frames 0 to 19"):
        trim_video(clip_of_kind("h264"), 5, 20)
    with pytest.raises(ValueError, match="frames 5 to 4"):
        trim_video(clip_of_kind("h264"), 5, 4)
    with pytest.raises(ValueError, match="does not time every packet"):
        trim_video(clip_of_kind("edit-list"), 2, 6)
