"""Collating samples."""

from dataclasses import replace

import pytest
import torch

from data.batch import Batch, EmptyCaption, Sample


def sample(length, *, shape=(2, 1, 4, 4), uid=0):
    return Sample(latent=torch.full(shape, float(uid)), text=torch.ones(length, 8), key=f"clip-{uid}", uid=uid)


def test_text_is_padded_to_the_longest_and_lengths_stay_on_the_host():
    batch = Batch.collate([sample(2, uid=5), sample(0, uid=6), sample(3, uid=7)])
    assert len(batch) == 3 and batch.latents.shape == (3, 2, 1, 4, 4)
    assert (batch.text_lengths, batch.uids, batch.keys) == ((2, 0, 3), (5, 6, 7), ("clip-5", "clip-6", "clip-7"))
    assert batch.text_mask.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    assert torch.equal(batch.text.sum(dim=-1) > 0, batch.text_mask)


def test_a_batch_of_empty_captions_has_one_column_of_padding():
    batch = Batch.collate([sample(0), sample(0)])
    assert batch.text.shape == (2, 1, 8) and not batch.text_mask.any() and not batch.text.any()


def test_moving_keeps_everything_else():
    batch = Batch.collate([sample(2), sample(1)])
    moved = batch.to("meta")
    assert moved.latents.device.type == moved.text.device.type == moved.text_mask.device.type == "meta"
    for name in ("text_lengths", "keys", "uids", "counts", "faults"):
        assert getattr(moved, name) == getattr(batch, name)


def test_a_batch_sums_faults_and_lists_which_samples_count():
    samples = [replace(sample(1), faults=2), replace(sample(1), faults=1, counts=False), sample(1)]
    batch = Batch.collate(samples)
    assert batch.faults == 3 and batch.counts == (True, False, True)
    assert batch.to("cpu").faults == 3 and batch.without_captions([True, False, False]).counts == batch.counts


def test_latents_of_two_shapes_are_refused():
    with pytest.raises(ValueError, match="latents of one shape"):
        Batch.collate([sample(1), sample(1, shape=(2, 1, 4, 6))])


def test_pooled_captions_go_with_the_batch():
    samples = [replace(sample(1), pooled=torch.full((3,), value)) for value in (1.0, 2.0)]
    batch = Batch.collate(samples)
    assert batch.pooled.tolist() == [[1.0] * 3, [2.0] * 3] and batch.to("meta").pooled.device.type == "meta"
    assert batch.without_captions([True, False]).pooled.tolist() == [[0.0] * 3, [2.0] * 3]
    assert Batch.collate([sample(1)]).pooled is None and Batch.collate([sample(1)]).to("meta").pooled is None
    with pytest.raises(ValueError, match="for all samples or none; got 2 of 3"):
        Batch.collate([*samples, sample(1)])


def test_an_encoded_empty_caption_takes_the_place_of_those_that_are_dropped():
    samples = [replace(sample(n), pooled=torch.full((3,), float(n))) for n in (1, 3, 2)]
    batch, drop = Batch.collate(samples), [False, True, True]
    width = batch.text.shape[2]
    for length in (2, 5):  # shorter and longer than the longest caption
        empty = EmptyCaption(torch.randn(length, width), torch.full((3,), -1.0))
        got = batch.with_empty_captions(drop, empty)
        expected = Batch.collate(
            [replace(s, text=empty.text, pooled=empty.pooled) if d else s for s, d in zip(samples, drop, strict=True)]
        )
        assert got.text_lengths == expected.text_lengths == (1, length, length)
        for name in ("text", "text_mask"):
            assert not getattr(got, name)[:, expected.text.shape[1] :].any()
            assert torch.equal(getattr(got, name)[:, : expected.text.shape[1]], getattr(expected, name))
        assert torch.equal(got.pooled, expected.pooled) and torch.equal(got.latents, batch.latents)
    assert batch.with_empty_captions([False] * 3, empty) is batch
