"""The two data modules: latents for a transformer, clips for a VAE. How they resume: see `data.resume`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.batch import Batch, Sample
from data.resume import ShardDataModule
from data.shards import LATENT_FORMAT, VIDEO_FORMAT
from data.stream import LatentDataset, VideoDataset, common_head

__all__ = ["LatentDataModule", "ShardDataModule", "VideoDataModule"]


class LatentDataModule(ShardDataModule):
    """Latents and captions for training a transformer; batches are `data.batch.Batch`.

    Args:
        shards: folder (or folders) of latent shards.
        val_shards: folder of validation latents; None takes the last `val_samples` of `shards`.
        val_samples: held-out samples if there are no `val_shards`, else how many of them are used.
        batch_size: training samples per rank and step.
        val_batch_size: validation samples per rank and step.
        num_workers: loader processes.
        passes: how often a nominal epoch visits each training sample; visits of one sample have different uids.
        seed: of the order.
        sample_latents: draw latents from the VAE's posterior, keyed by uid, instead of taking its mean.
    """

    format = LATENT_FORMAT

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | None = None,
        val_samples: int = 16,
        batch_size: int = 16,
        val_batch_size: int = 16,
        num_workers: int = 0,
        passes: int = 1,
        seed: int = 0,
        sample_latents: bool = False,
    ) -> None:
        super().__init__(
            shards=shards, val_shards=val_shards, val_samples=val_samples, batch_size=batch_size,
            val_batch_size=val_batch_size, num_workers=num_workers, passes=passes, seed=seed,
        )  # fmt: skip
        self.sample_latents = sample_latents
        self.latent_shape: tuple[int, int, int, int]
        self.text_width: int

    def check(self) -> list[dict[str, Any]]:
        """Like `ShardDataModule.check`; sets `latent_shape` (C, F, H, W) and `text_width`.

        Raises:
            ValueError: also if folders differ in shape, width or normalisation.
        """
        indices = super().check()
        head = common_head([*self.shards, *([self.val_shards] if self.val_shards else [])], indices)
        channels, frames, height, width = head["latent_shape"]
        self.latent_shape = (channels, frames, height, width)
        self.text_width = head["text_width"]
        return indices

    def make_dataset(self, folders: Sequence[Path]) -> LatentDataset:
        return LatentDataset(folders, sample_latents=self.sample_latents)

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        return Batch.collate(samples)

    def probe_samples(self, count: int) -> list[Sample]:
        """The first `count` validation samples: the same on every rank and in every epoch.

        Raises:
            ValueError: if there are fewer.
        """
        if not 1 <= count <= len(self.val_split):
            raise ValueError(
                f"got {count} probe samples, expected 1 to {len(self.val_split)}, the validation samples; "
                "lower the number of probes, or raise data.val_samples."
            )
        return [self.val_split[number] for number in range(count)]


class VideoDataModule(ShardDataModule):
    """Clips for training a VAE: {"video": (B, 3, T, H, W) float32 in [-1, 1], "uid": (B,), "key": list of names}.

    Args:
        shards: folder (or folders) of video shards.
        val_shards: folder of validation clips; None takes the last `val_samples` of `shards`.
        val_samples: held-out clips if there are no `val_shards`, else how many of them are used.
        batch_size: clips per rank and step.
        val_batch_size: validation clips per rank and step.
        num_workers: loader processes; each decodes.
        passes: how often a nominal epoch visits each clip.
        seed: of the order.
        frames: first frames of each clip.
        height: clips of another size are scaled and cropped about the centre.
        width: likewise.
    """

    format = VIDEO_FORMAT

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | None = None,
        val_samples: int = 16,
        batch_size: int = 8,
        val_batch_size: int = 8,
        num_workers: int = 0,
        passes: int = 1,
        seed: int = 0,
        frames: int = 19,
        height: int = 64,
        width: int = 64,
    ) -> None:
        super().__init__(
            shards=shards, val_shards=val_shards, val_samples=val_samples, batch_size=batch_size,
            val_batch_size=val_batch_size, num_workers=num_workers, passes=passes, seed=seed,
        )  # fmt: skip
        self.frames, self.height, self.width = frames, height, width

    def make_dataset(self, folders: Sequence[Path]) -> VideoDataset:
        return VideoDataset(folders, frames=self.frames, height=self.height, width=self.width)

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        return {
            "video": torch.stack([sample["video"] for sample in samples]),
            "uid": torch.tensor([sample["uid"] for sample in samples]),
            "key": [sample["key"] for sample in samples],
        }
