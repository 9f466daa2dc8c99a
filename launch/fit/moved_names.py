"""Class paths in recipes of earlier versions, and their new class paths."""

MOVED = {
    "data.datamodule.LatentDataModule": "data.modules.latents.LatentDataModule",
    "data.datamodule.VideoDataModule": "data.modules.videos.VideoDataModule",
    "data.online.EncodingDataModule": "data.modules.online.EncodingDataModule",
    "trainer.callbacks.trunk.TrunkStore": "trainer.callbacks.trunk_cache.TrunkCache",
    "trainer.callbacks.trunk_cache.TrunkStore": "trainer.callbacks.trunk_cache.TrunkCache",
    "trainer.sharding.ShardedStrategy": "trainer.parallel.strategies.ShardedStrategy",
    "trainer.vae.TrainVae": "launch.demo.train_vae.TrainVae",
}
