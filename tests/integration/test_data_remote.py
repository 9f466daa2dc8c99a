"""Training from a web server: only what is needed travels, outages pass, what is gone for good costs its samples."""

import json
import logging
import threading
from pathlib import Path

import pytest

from data.modules.latents import LatentDataModule
from data.storage.store import Store
from tests.support.http_store import WebStore
from tests.support.latent_shards import write_latents

BUCKET = "1x16x16"
SHARDS = [f"{BUCKET}-{number:06d}.tar" for number in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"), [(BUCKET, 8)] * 4, width=64)


@pytest.fixture
def web(folder):
    with WebStore(Path(folder)) as server:
        yield server


def module(shards, **options):
    data = LatentDataModule(**{"shards": shards, "val_samples": 4, "batch_size": 4} | options)
    data.store = Store(backoff=0.01, attempts=4)
    return data


def batches(data):
    return [(batch.uids, batch.keys, batch.latents.tolist(), batch.text.tolist()) for batch in data.train_dataloader()]


@pytest.fixture(scope="module")
def local(folder):
    return batches(module(folder))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_same_shards_on_disk(web, local, workers):
    assert batches(module(web.url, num_workers=workers)) == local


def test_shards_by_brace_notation(web, folder):
    data = module(f"{web.url}/{BUCKET}-{{000001..000002}}.tar")
    assert {key for _, keys, *_ in batches(data) for key in keys} <= {f"clip-{i:02d}" for i in range(8, 24)}
    assert not web.asked[SHARDS[0]]


def test_a_resumed_run_asks_only_for_what_is_left(web, folder):
    data = module(web.url)
    data.load_state_dict({"epoch": 0, "batches": 6})
    assert len(batches(data)) == 1
    assert sum(web.asked[shard] for shard in SHARDS) == 4  # one range a sample
    assert web.sent < 0.5 * sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


def test_with_a_cache_a_second_epoch_asks_for_nothing(web, local, tmp_path):
    for asked in (28, 28):
        data = LatentDataModule(shards=web.url, val_samples=4, batch_size=4, cache=str(tmp_path / "cache"))
        assert batches(data) == local
        assert sum(web.asked[shard] for shard in SHARDS) == asked


def test_an_outage_that_passes_changes_nothing(web, local):
    data = module(web.url)
    data.check()
    for shard in SHARDS:
        web.fail(shard, 3)
    assert batches(data) == local


@pytest.mark.parametrize("status", [503, 404, 403])
def test_a_shard_that_is_gone_for_good_costs_its_samples(web, tmp_path, caplog, status):
    data = module(web.url, max_fault_share=0.3)
    data.check()
    data._faults.path = tmp_path / "faults.jsonl"
    web.fail(SHARDS[1], status=status)
    with caplog.at_level(logging.WARNING):
        seen = batches(data)
    assert [len(uids) for uids, *_ in seen] == [4] * 7
    keys = {key for _, keys, *_ in seen for key in keys}
    assert keys == {f"clip-{i:02d}" for i in range(28)} - {f"clip-{i:02d}" for i in range(8, 16)}
    rows = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert sorted(row["key"] for row in rows) == [f"clip-{i:02d}" for i in range(8, 16)]
    assert {row["shard"] for row in rows} == {f"{web.url}/{SHARDS[1]}"}
    assert all("cannot be read after" in row["reason"] for row in rows)


def test_a_shard_that_does_not_answer_is_given_up(tmp_path):
    """Not each of its forty samples is asked for again and again."""
    folder = write_latents(tmp_path, [(BUCKET, 40)] * 2)
    with WebStore(tmp_path) as web:
        data = module(web.url, max_fault_share=0.6)
        data.check()
        web.fail(SHARDS[1])
        keys = {key for _, keys, *_ in batches(data) for key in keys}
        assert keys == {f"clip-{i:02d}" for i in range(40)} and Path(folder).is_dir()
        assert 4 * 3 <= web.asked[SHARDS[1]] <= 4 * (3 + 4)  # three in a row, and those already on their way


def test_a_store_that_is_gone_for_good_stops_the_run_and_says_why(web):
    data = module(web.url, max_fault_share=0.1)
    data.check()
    for shard in SHARDS:
        web.fail(shard)
    with pytest.raises(ValueError, match=r"\d of 32 samples are damaged.*max_fault_share 0\.1.*cannot be read after 4"):
        batches(data)


def test_a_store_that_is_not_there_is_an_error_at_the_start(web):
    web.fail("index.json")
    with pytest.raises(OSError, match=r"index\.json cannot be read after 4"):
        module(web.url).check()


def test_samples_of_a_batch_are_read_at_the_same_time(web, local):
    """A store that answers only once four requests wait: one after another, they would wait for ever."""
    barrier = threading.Barrier(4, timeout=20)

    class Together(Store):
        def read(self, location, offset=0, size=None, *, version=""):
            if location.endswith(".tar"):
                barrier.wait()
            return super().read(location, offset, size, version=version)

    data = module(web.url)
    data.store = Together()
    assert batches(data) == local
