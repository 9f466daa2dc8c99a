"""Clips written with PyAV."""

import numpy as np
import pytest

from data.video.write import write_video
from tests.support import broken_clips
from tests.support.drawn_clips import moving_bar


def test_the_same_frames_give_the_same_bytes(clip, tmp_path):
    write_video(tmp_path / "again.mp4", moving_bar(), fps=12)
    assert (tmp_path / "again.mp4").read_bytes() == clip.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"bar.mp4", "again.mp4"}  # nothing is left beside


def test_the_bytes_do_not_depend_on_earlier_encoders(tmp_path):
    """x264 with AVX-512 read what earlier encoders had left there; most of all with its slower settings."""
    seen: dict[str, set[bytes]] = {"fast": set(), "slow": set()}
    for size in range(16, 76, 2):
        write_video(tmp_path / "other.mp4", moving_bar(height=size, width=112 - size), fps=12)
        write_video(tmp_path / "fast.mp4", moving_bar(frames=12, height=64), fps=12)
        broken_clips.write_clip(tmp_path / "slow.mp4", broken_clips.scene())
        for name, contents in seen.items():
            contents.add((tmp_path / f"{name}.mp4").read_bytes())
    assert {name: len(contents) for name, contents in seen.items()} == {"fast": 1, "slow": 1}


def test_frames_that_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "x.mp4", moving_bar(height=47), fps=12)
    for wrong in (moving_bar()[0], moving_bar().astype(np.float32), moving_bar()[:0]):
        with pytest.raises(ValueError, match="got frames"):
            write_video(tmp_path / "x.mp4", wrong, fps=12)
    assert not list(tmp_path.iterdir())
