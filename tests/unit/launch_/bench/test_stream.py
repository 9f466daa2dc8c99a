"""The stream's benchmark compares equal work."""

import os
import shutil

import pytest
import torch

from data.bucket import Bucket
from launch.bench import stream as bench


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    bench.write_shards(folder, 81, Bucket(1, 16, 16), 20, (2, 5))
    return folder


def test_every_way_reads_every_sample(shards):
    assert bench.read_plain(shards, 0) == 81 and bench.read_bytes(shards, 1) == 81
    assert bench.read_ours(shards, 0) == 80  # one is held out, 80 are five batches


def test_the_plain_pipeline_gives_what_ours_gives(shards):
    def samples(batches):
        rows = [row for b in batches for row in zip(b.keys, b.latents, b.text, b.text_lengths, strict=True)]
        return {key: (latent, text[:length]) for key, latent, text, length in rows}

    ours, plain = samples(bench._module(shards, 0).train_dataloader()), samples(bench.plain_pipeline(shards, 0))
    assert len(ours) == 80 and set(ours) < set(plain)
    for key, (latent, text) in ours.items():
        assert torch.equal(latent, plain[key][0]) and torch.equal(text, plain[key][1])


def test_a_way_that_reads_too_little_is_not_reported(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "1x16x16-000001.tar", 1000)
    with pytest.raises(RuntimeError, match=r"read \d+ of \d+ bytes"):
        bench.read_bytes(tmp_path / "cut", 1)


def test_resume_and_rates_are_measured(shards, tmp_path):
    bench.write_shards(tmp_path, 200, Bucket(1, 16, 16), 50, None)
    resumed, whole = bench.resume_cost(tmp_path, 0, 2, batch_size=4)
    assert 0 < resumed < whole
    found = bench.rates(shards, 0, 2)
    assert list(found) == [bench.OURS, bench.PLAIN, bench.BYTES] and {len(v) for v in found.values()} == {2}
