"""Clips for the tests of `data.video`."""

import functools

import pytest

from data.video.write import write_video
from tests.support import broken_clips
from tests.support.drawn_clips import moving_bar


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "bar.mp4"
    write_video(path, moving_bar(), fps=12)
    return path


@pytest.fixture(scope="session")
def clip_of_kind(tmp_path_factory):
    """name of a kind in `broken_clips` -> path; each file is written once, when a test asks for it."""
    folder = tmp_path_factory.mktemp("clips")
    return functools.cache(lambda name: broken_clips.make(name, folder))
