"""Latents read out of archives: found, normalised, drawn, split, and what happens where they are damaged."""

import json
import logging
import pickle
import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from data.shards import sample_table
from data.shards.format import record_name
from data.storage.store import Store
from data.stream import reader
from data.stream.clips import ClipReader, VideoReader
from data.stream.hold_out import everything, hold_out, shares
from data.stream.latents import LatentReader
from tests.support.latent_shards import write_latents

BUCKET, SHAPE = "7x32x32", (3, 2, 4, 4)
OTHER = "1x16x32"
MEAN, STD = [0.5, -1.0, 0.0], [2.0, 0.5, 1.0]
HEAD = {"channels": 3, "latents_mean": MEAN, "latents_std": STD}


def raw_latent(i, shape=SHAPE):
    return torch.randn(shape, generator=torch.Generator().manual_seed(i))


def make(folder, shards=((BUCKET, 3), (BUCKET, 2)), **options):
    return write_latents(folder, shards, latent=raw_latent, logvar=float, **{**HEAD, **options})


def damaged(entry):
    return entry | {"safetensors": b"damaged"}


def split(locations, **options):
    """All samples of some latent shards."""
    return everything(LatentReader(locations, **options))


def keys(samples):
    return [samples[i].key for i in range(len(samples))]


def test_latents_are_normalised_per_channel_and_captions_have_their_length(tmp_path):
    samples = split([make(tmp_path)])
    assert len(samples) == 5 and samples.reader.latent_shapes == {BUCKET: SHAPE} and samples.reader.text_width == 8
    for i in range(5):
        sample = samples[i]
        raw = raw_latent(i).half().float()
        expected = (raw - torch.tensor(MEAN).view(3, 1, 1, 1)) / torch.tensor(STD).view(3, 1, 1, 1)
        assert torch.equal(sample.latent, expected) and sample.latent.dtype == torch.float32
        assert torch.equal(sample.text, torch.full((i % 4, 8), float(i)))
        assert (sample.key, sample.uid, sample.faults, sample.counts) == (f"clip-{i:02d}", i, 0, True)
    again = samples[5]
    assert (again.key, again.uid, again.counts) == ("clip-00", 5, True)


def test_shards_are_found_by_folder_wildcard_braces_and_one_by_one(tmp_path):
    for name, count in (("a", 2), ("b", 3), ("c", 1)):
        make(tmp_path / name, shards=[(BUCKET, count), (BUCKET, 1)])
    sizes = {
        "*": [2, 1, 3, 1, 1, 1],
        "{c,a}": [1, 1, 2, 1],
        "b": [3, 1],
        "b/": [3, 1],
        f"b/{BUCKET}-000001.tar": [1],
        f"{{a,b}}/{BUCKET}-000000.tar": [2, 3],
        f"b/{BUCKET}-{{000001,000000}}.tar": [3, 1],  # in the order of the index
    }
    for location, expected in sizes.items():
        assert LatentReader([f"{tmp_path}/{location}"]).shard_sizes == expected, location
    for wrong, message in (
        ([tmp_path / "a", tmp_path / "a"], "comes twice"),
        ([tmp_path / "a", tmp_path / "a" / f"{BUCKET}-000000.tar"], "comes twice"),
        ([tmp_path / "a" / "gone.tar"], "has no shards"),
        ([tmp_path / "x*"], "matches nothing"),
        (["pipe:cat a.tar"], "never code"),
    ):
        with pytest.raises(ValueError, match=message):
            LatentReader(wrong)


def test_drawing_from_the_posterior_is_keyed_by_uid_and_has_its_width(tmp_path):
    folder = make(tmp_path)
    always, mean = split([folder], sample_latents=True), split([folder])
    std = torch.tensor(STD).view(3, 1, 1, 1)
    for drawn in (always, always.in_epoch(0, 0)):
        assert torch.equal(drawn[2].latent, drawn[2].latent)
        assert not torch.equal(drawn[2].latent, drawn[7].latent)  # the same sample in the second pass
        draws = torch.stack([drawn[2 + 5 * number].latent for number in range(300)])
        noise = (draws - mean[2].latent) * std
        # The logvar of sample 2 is 2.
        assert abs(noise.std().item() / torch.tensor(2.0).mul(0.5).exp().item() - 1) < 0.03
        assert abs(noise.mean().item()) < 0.1


def test_each_epoch_and_seed_draws_anew(tmp_path):
    always = split([make(tmp_path)], sample_latents=True)
    views = {(seed, epoch): always.in_epoch(seed, epoch) for seed in range(3) for epoch in range(3)}
    draws = [view[2].latent for view in (always, *views.values())]
    for i, draw in enumerate(draws):
        assert not any(torch.equal(draw, other) for other in draws[:i])
    assert torch.equal(always[2].latent, draws[0]) and torch.equal(
        always.in_epoch(2, 1)[2].latent, views[2, 1][2].latent
    )
    assert {view[2].uid for view in views.values()} == {2}


# -- splits ----------------------------------------------------------------------------------------------------------

MIXED = [(BUCKET, 5), (OTHER, 6), (BUCKET, 7), (OTHER, 2)]  # samples 0-4, 5-10, 11-17, 18-19


def test_each_bucket_holds_out_its_last_samples_in_proportion(tmp_path):
    train, held = hold_out(LatentReader([make(tmp_path, shards=MIXED)]), 5)
    assert [held[i].key for i in range(5)] == ["clip-15", "clip-16", "clip-17", "clip-18", "clip-19"]
    kept = [train[i].key for i in range(15)]
    assert kept == [f"clip-{i:02d}" for i in range(15)]
    assert [train[i].uid for i in range(15)] + [held[i].uid for i in range(5)] == list(range(20))
    assert [(g.name, len(g)) for g in train.groups] == [(OTHER, 6), (BUCKET, 9)]
    assert [(g.name, g.starts.tolist(), g.sizes.tolist()) for g in held.groups] == [
        (OTHER, [3], [2]),
        (BUCKET, [0], [3]),
    ]


@pytest.mark.parametrize(
    ("counts", "total", "expected"),
    [([8], 3, [3]), ([12, 8], 5, [3, 2]), ([990, 10], 4, [3, 1]), ([1, 1, 98], 3, [0, 0, 3]), ([5, 5, 5], 2, [1, 1, 0]),
     ([1, 1], 1, [1, 0]), ([100, 3, 2], 3, [1, 1, 1])],
)  # fmt: skip
def test_shares_follow_the_counts(counts, total, expected):
    assert shares(counts, total) == expected


def test_a_second_look_at_a_held_out_sample_does_not_count(tmp_path):
    train, held = hold_out(LatentReader([make(tmp_path)]), 2)
    assert [held[i].counts for i in (0, 1, 2, 3)] == [True, True, False, False]
    assert held[2].key == held[0].key and train[4].counts


# -- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_sample_is_replaced_by_another_of_its_bucket_and_split(tmp_path, caplog):
    spoil = dict.fromkeys((2, 4, 14, 17, 19), damaged)
    folder = make(tmp_path, shards=MIXED, spoil=spoil)
    train, held = hold_out(LatentReader([folder], max_fault_share=0.5), 5)
    with caplog.at_level(logging.WARNING):
        taken = train[2]
    assert taken.uid == 2 and taken.faults >= 1
    assert f"{BUCKET}-000000.tar: clip-02 is damaged" in caplog.text
    alike = {f"clip-{i:02d}" for i in (0, 1, 3, 11, 12, 13)}  # of its bucket, trained on, whole
    assert {train[visit].key for first in (2, 4, 14) for visit in range(first, 15 * 40, 15)} == alike
    assert {held[i].key for i in (2, 4)} == {"clip-15", "clip-18"} or held[2].key == "clip-16"
    again = train[2]  # its faults are known now: counted again, not read
    assert (again.key, again.uid, again.faults) == (taken.key, taken.uid, taken.faults)


def test_the_visits_of_a_lost_shard_spread_and_any_process_finds_the_same(tmp_path):
    folder = Path(make(tmp_path, shards=[(BUCKET, 40)] * 5, key="clip-{:03d}"))
    (folder / f"{BUCKET}-000001.tar").unlink()
    lost = range(40, 80)

    def fresh():
        return split([str(folder)], max_fault_share=0.5)

    train = fresh()
    found = {visit: train[visit].key for number in range(3) for visit in (200 * number + i for i in lost)}
    counts = Counter(found.values())
    assert len(counts) > 60 and max(counts.values()) <= 6  # 120 visits drawn from 160 samples: 84 of them, at most 4-5
    other = fresh()
    for visit in random.Random(0).sample(sorted(found), 30):  # another process, which has met other samples before
        assert other[visit].key == found[visit]
    assert not {f"clip-{i:03d}" for i in lost} & set(counts)


def test_one_sample_that_is_left_of_many_is_found(tmp_path):
    spoil = {i: damaged for i in range(300) if i != 207}
    samples = split([make(tmp_path, shards=[(BUCKET, 150)] * 2, spoil=spoil, key="clip-{:03d}")],
                            max_fault_share=1.0)  # fmt: skip
    assert [samples[i].key for i in (3, 299)] == ["clip-207"] * 2
    assert 1 <= samples[3].faults <= 299


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (damaged, "Error while deserializing"),
        (lambda entry: entry | {"safetensors": b""}, "Error while deserializing"),
        (lambda entry: entry | {"safetensors": save({"logvar": torch.zeros(SHAPE).half()})}, "lacks 'mean'"),
        (lambda entry: {k: v for k, v in entry.items() if k != "safetensors"}, "lacks 'safetensors'"),
        (lambda entry: entry | {"safetensors": save({"mean": torch.full(SHAPE, torch.nan).half()})}, "not finite"),
        (lambda entry: entry | {"safetensors": save({"mean": torch.full(SHAPE, torch.inf).half()})}, "not finite"),
        (lambda entry: entry | {"safetensors": save({"mean": torch.zeros(3, 2, 4, 6).half()})}, r"is \(3, 2, 4, 6\)"),
    ],
)
def test_what_counts_as_damage(tmp_path, caplog, spoil, reason):
    samples = split([make(tmp_path, spoil={1: spoil})])
    with caplog.at_level(logging.WARNING):
        assert samples[1].key == "clip-02"
    assert "clip-01" in caplog.text
    assert re.search(reason, caplog.text), caplog.text


def test_a_sample_whose_record_names_no_caption_is_damage(tmp_path, caplog):
    folder = Path(make(tmp_path))
    record = folder / record_name(f"{BUCKET}-000000.tar")
    listed = json.loads(record.read_text())
    del listed["samples"][1][1]["text"]
    record.write_text(json.dumps(listed))
    assert split([folder])[1].key == "clip-02"
    assert "clip-01 is damaged" in caplog.text and "lacks 'text'" in caplog.text


def test_no_pickle_is_read(tmp_path):
    """A checkpoint where a latent should be is damage: nothing of it is run."""

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    def trap(entry):
        return entry | {"safetensors": pickle.dumps(Trap())}

    assert split([make(tmp_path / "s", spoil={1: trap})])[1].key == "clip-02"
    assert not (tmp_path / "ran").exists()


def test_captions_with_numbers_that_are_not_finite_or_of_another_width_are_damage(tmp_path):
    folder = make(tmp_path / "a", text=lambda i: torch.full((2, 8), torch.nan if i == 1 else 1.0))
    assert split([folder])[1].key == "clip-02"
    folder = make(tmp_path / "b", text=lambda i: torch.ones(2, 8 + (i == 1)))
    assert split([folder])[1].key == "clip-02"


def test_past_a_share_of_damaged_samples_reading_stops(tmp_path):
    samples = split([make(tmp_path, spoil=dict.fromkeys((1, 3), damaged))])
    assert samples[1].key == "clip-02"  # one is always let pass
    with pytest.raises(ValueError, match=r"2 of 5 samples are damaged.*max_fault_share 0.01.*clip-03"):
        samples[3]


def test_a_shard_that_is_cut_absent_or_without_record_costs_its_samples(tmp_path):
    folder = Path(make(tmp_path))
    shard = folder / f"{BUCKET}-000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:900])
    whole_ones = ["clip-00", "clip-01", "clip-02"]

    def check(kept=3):
        found = keys(split([folder], max_fault_share=0.5))
        assert found[:kept] == [*whole_ones, "clip-03"][:kept] and set(found) == set(found[:kept])

    check()
    shard.unlink()
    check()
    shard.write_bytes(whole)
    record = folder / record_name(shard.name)
    listed = json.loads(record.read_text())
    record.write_text(json.dumps(listed | {"samples": listed["samples"][:1]}))
    check(kept=4)
    record.write_text(record.read_text()[:100])
    check()


@pytest.mark.parametrize(
    ("head", "field"),
    [({"width": 16}, "text_width"), ({"latents_mean": [0.0] * 3}, "latents_mean"), ({"channels": 4}, "channels")],
)
def test_folders_that_differ_are_refused(tmp_path, head, field):
    with pytest.raises(ValueError, match=f"has {field} .*must agree|{field}"):
        LatentReader([make(tmp_path / "a"), make(tmp_path / "b", **head)])


def test_folders_of_other_buckets_go_together(tmp_path):
    samples = split([make(tmp_path / "a"), make(tmp_path / "b", shards=[(OTHER, 2)])])
    assert [tuple(samples[i].latent.shape) for i in (0, 5)] == [SHAPE, (3, 1, 2, 4)]


def test_shards_of_another_format_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has format 'reblock-latents-2', expected 'reblock-videos-2'"):
        ClipReader([make(tmp_path)])
    with pytest.raises(ValueError, match="expected 'reblock-videos-2'"):
        VideoReader([tmp_path], frames=2, height=32, width=32)


# -- reading ---------------------------------------------------------------------------------------------------------


class Counting(Store):
    """A store that notes what it is asked for."""

    def __init__(self):
        super().__init__()
        self.reads = []

    def read(self, location, offset=0, size=None, *, version=""):
        content = super().read(location, offset, size, version=version)
        self.reads.append((location.rpartition("/")[2], len(content)))
        return content


def test_a_sample_is_one_read_and_a_record_is_read_once(tmp_path):
    store = Counting()
    samples = split([make(tmp_path, shards=[(BUCKET, 6)])], store=store)
    store.reads.clear()
    for number in (0, 3, 3, 5):
        samples[number]
    assert [name for name, _ in store.reads] == [f"{BUCKET}-000000.json"] + [f"{BUCKET}-000000.tar"] * 4


def test_a_caption_far_from_its_latent_is_read_apart(tmp_path, monkeypatch):
    """A caption that many samples share lies before the first of them."""
    store = Counting()
    samples = split([make(tmp_path, text=lambda i: torch.ones(3, 8))], store=store)
    expected = samples[1]
    sizes = store.reads[-1][1]
    original = reader.read_members
    monkeypatch.setattr(
        "data.stream.reader.read_members", lambda shard, members, store: original(shard, members, store, gap=0)
    )
    store.reads.clear()
    apart = samples[1]
    assert len(store.reads) == 2 and sum(size for _, size in store.reads) < sizes
    assert torch.equal(apart.latent, expected.latent) and torch.equal(apart.text, expected.text)


def test_the_cache_of_tables_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_table, "_CACHED_ROWS", 4)
    store = Counting()
    samples = split([make(tmp_path, shards=[(BUCKET, 2)] * 4)], store=store)
    store.reads.clear()
    for number in (0, 2, 0, 4, 0, 2):  # shards 0, 1, 0, 2, 0, 1: the third evicts the second, not the first
        samples[number]
    assert [name for name, _ in store.reads if name.endswith("json")] == [
        f"{BUCKET}-{shard:06d}.json" for shard in (0, 1, 2, 1)
    ]
