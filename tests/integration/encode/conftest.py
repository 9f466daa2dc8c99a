"""A tiny base, seven clips and their video shards, to be encoded. Tests only read them."""

import pytest

from tests.support.clip_shards import write_encoders, write_video_shards
from tests.support.encoded_shards import lay_out, make_clips


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """(key, mp4, caption) of each clip."""
    return make_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="session")
def shards(clips, tmp_path_factory):
    return write_video_shards(tmp_path_factory.mktemp("video"), lay_out(clips), per_shard=3)
