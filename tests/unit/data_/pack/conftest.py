"""Small synthetic clips to pack."""

import pytest

from data.synth.command import synth


@pytest.fixture(scope="session")
def synthetic_clips(tmp_path_factory):
    """A folder of seven captioned clips, only to be read."""
    folder = tmp_path_factory.mktemp("synthetic")
    synth(folder, clips=7, frames=7, size=32)
    return folder


@pytest.fixture
def clips(synthetic_clips, tmp_path):
    """A folder of seven captioned clips that a test may change."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for path in synthetic_clips.glob("clip-*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def clip(synthetic_clips):
    """number -> bytes of a clip."""
    return lambda i: (synthetic_clips / f"clip-{i:06d}.mp4").read_bytes()
