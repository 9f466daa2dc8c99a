"""The stream's cache of a remote store: it answers in the store's place, and knows shards that took another's name."""

import shutil

import torch

from data.modules.latents import LatentDataModule
from tests.support.http_store import WebStore
from tests.support.latent_shards import write_latents


def read(url, cache):
    module = LatentDataModule(shards=url, val_samples=1, batch_size=5, cache=str(cache))
    return next(iter(module.train_dataloader())).latents


def test_replaced_shards_are_read_anew(tmp_path):
    served = tmp_path / "served"
    shards = [("7x32x32", 6)]
    write_latents(served, shards)
    with WebStore(served) as web:
        before = read(web.url, tmp_path / "cache")
        asked = web.asked["7x32x32-000000.tar"]
        assert torch.equal(read(web.url, tmp_path / "cache"), before)
        assert web.asked["7x32x32-000000.tar"] == asked  # from the cache
        shutil.rmtree(served)
        write_latents(served, shards, latent=lambda i, shape: torch.full(shape, 100.0 + i))
        assert torch.equal(read(web.url, tmp_path / "cache"), before + 100)
