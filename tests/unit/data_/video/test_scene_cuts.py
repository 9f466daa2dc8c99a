"""Cuts found in real files that are known to have them, or none."""

import numpy as np
import pytest

from data.video.scene_cuts import scene_cuts
from tests.support import broken_clips


def pan(seed, frames, step):
    """A random pattern that slides left by `step` pixels per frame."""
    pattern = np.random.default_rng(seed).integers(0, 255, (12, 40, 3), dtype=np.uint8)
    pattern = np.kron(pattern, np.ones((8, 8, 1), dtype=np.uint8))
    return np.stack([np.roll(pattern, -step * t, axis=1)[:, :128] for t in range(frames)])


THREE_SCENES = np.concatenate([pan(1, 10, 1), pan(2, 7, 1), pan(3, 8, 1)])
CODECS = {
    "h264": ("libx264", "yuv420p", {"bf": "3"}),
    "h264-10-bit": ("libx264", "yuv420p10le", {}),
    "hevc": ("libx265", "yuv420p", {"x265-params": "log-level=none:pools=none:frame-threads=1"}),
    "vp9": ("libvpx-vp9", "yuv420p", {}),
}


@pytest.mark.parametrize("codec", CODECS)
def test_the_cuts_of_a_clip_are_found_to_the_frame(tmp_path, codec):
    path = tmp_path / "cuts.mp4"
    broken_clips.write_clip(path, THREE_SCENES, *CODECS[codec])
    assert scene_cuts(path) == pytest.approx([1.0, 1.7])
    assert scene_cuts(path.read_bytes()) == scene_cuts(path)


def test_cuts_are_times_and_not_frames(tmp_path):
    times = [0, 10, 20, 25, 30, 60, 61, 62, 90, 100, 130, 140, 150, 155, 160, 170, 171, 190, 220, 300, 310, 320, 330, 340, 350]  # fmt: skip  # noqa: E501
    path = tmp_path / "varies.mp4"
    broken_clips.write_clip(path, THREE_SCENES, times=[time + 500 for time in times])
    assert scene_cuts(path) == pytest.approx([1.3, 1.9])  # from the first frame, wherever the clock stands


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_pan_is_no_cut(tmp_path, step):
    broken_clips.write_clip(tmp_path / "pan.mp4", pan(1, 25, step))
    assert scene_cuts(tmp_path / "pan.mp4") == []


@pytest.mark.parametrize("kind", ["one-frame", "h264-b-frames", "odd-size", "rotated-90"])
def test_clips_of_one_scene_have_no_cut(tmp_path, kind):
    assert scene_cuts(broken_clips.make(kind, tmp_path)) == []


def test_the_threshold_decides(tmp_path):
    video = np.concatenate([np.full((5, 48, 64, 3), 60, np.uint8), np.full((5, 48, 64, 3), 110, np.uint8)])
    broken_clips.write_clip(tmp_path / "step.mp4", video)
    assert scene_cuts(tmp_path / "step.mp4", 0.5) == []
    assert scene_cuts(tmp_path / "step.mp4", 0.05) == pytest.approx([0.5])
    for wrong in (0, 1, 30, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1"):
            scene_cuts(tmp_path / "step.mp4", wrong)


@pytest.mark.parametrize("kind", ["empty", "audio-only", "junk", "truncated", "play-list"])
def test_broken_clips_are_named(tmp_path, kind):
    with pytest.raises(ValueError, match=broken_clips.BROKEN[kind].reason):
        scene_cuts(broken_clips.make(kind, tmp_path))
