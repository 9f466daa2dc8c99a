"""Facts of clips."""

import numpy as np
import pytest

from data.video.decode import decode_video
from data.video.probe import VideoInfo, probe_times, probe_video
from tests.support.drawn_clips import moving_bar


def test_facts_and_frames_survive_writing_and_reading(clip):
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


def test_a_clip_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.mp4 cannot be decoded \(no such file or directory\)"):
        probe_video(tmp_path / "gone.mp4")


def test_probing_gives_the_times_too(clip):
    info, times = probe_times(clip)
    assert info == probe_video(clip)
    assert np.allclose(times, np.arange(7) / 12)
