"""The data modules over shards: latents for a transformer, clips for a VAE (`data.modules.online` encodes in the step).

How they are ordered, split and resumed: see `data.modules.resumable`.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from data.batch import Batch, Sample
from data.bucket import Bucket
from data.modules.resumable import ShardDataModule
from data.shards.format import LATENT_FORMAT, VIDEO_FORMAT
from data.stream.clips import VideoDataset
from data.stream.latents import LatentDataset, common_head
from data.stream.order import Group
from data.stream.shard_index import Source

__all__ = ["LatentDataModule", "LatentSource", "ShardDataModule", "VideoDataModule"]


class LatentSource(ShardDataModule):
    """A data module whose batches are `data.batch.Batch`.

    `check` sets `latent_shapes`, bucket name -> (C, F, H, W), and `text_width`.
    """

    latent_shapes: dict[str, tuple[int, int, int, int]]
    text_width: int

    @property
    def probe_bucket(self) -> Bucket:
        """The bucket that probes come from: that of most validation samples, of equals the largest."""
        groups = [(len(group), Bucket.parse(group.name)) for group in self.val_split.groups]
        return max(groups, key=lambda g: (g[0], g[1].frames * g[1].height * g[1].width, g[1]))[1]

    def probe_samples(self, count: int) -> list[Sample]:
        """The first `count` validation samples of `probe_bucket`: the same on every rank and in every epoch.

        Raises:
            ValueError: if there are fewer.
        """
        group = self.check_probes(count)
        positions = [
            p for start, size in zip(group.starts, group.sizes, strict=True) for p in range(start, start + size)
        ]
        return self.held_out_samples(positions[:count])

    def check_probes(self, count: int) -> Group:
        """Whether there are so many probes, before a model is loaded: the group that they come from.

        Raises:
            ValueError: if there are fewer.
        """
        name = self.probe_bucket.name
        group = next(group for group in self.val_split.groups if group.name == name)
        if not 1 <= count <= len(group):
            raise ValueError(
                f"got {count} probe samples, expected 1 to {len(group)}, the validation samples of bucket {name}; "
                "lower the number of probes, or raise data.val_samples."
            )
        return group

    @abstractmethod
    def held_out_samples(self, positions: Sequence[int]) -> list[Sample]:
        """Validation samples by position."""


class LatentDataModule(LatentSource):
    """Latents and captions for training a transformer; batches are `data.batch.Batch`.

    Args:
        shards: latent shards: folders, `.tar` files in them, wildcards, braces, or URLs of such.
        val_shards: validation latents; None holds out the last samples of each bucket of `shards`.
        val_samples: held-out samples if there are no `val_shards`, else how many of them are used; each bucket has its
            share of them.
        batch_size: training samples per rank and step; 16 if `global_batch_size` is not given either.
        global_batch_size: training samples per step over all ranks, instead of `batch_size`: the sequence of global
            batches is then the same on any number of ranks.
        val_batch_size: validation samples per rank and step.
        num_workers: loader processes.
        prefetch_factor: batches that each of them holds ready.
        passes: how often a nominal epoch visits each training sample; visits of one sample have different uids.
        seed: of the order.
        sample_latents: draw latents from the VAE's posterior, keyed by uid, instead of taking its mean.
        max_fault_share: share of samples that may be damaged; they are named in the run's `faults.jsonl`.
        cache: local folder for what is read of remote shards; None keeps nothing.
        cache_bytes: its bound.
    """

    format = LATENT_FORMAT

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | list[str] | None = None,
        val_samples: int = 16,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        val_batch_size: int = 16,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        passes: int = 1,
        seed: int = 0,
        sample_latents: bool = False,
        max_fault_share: float = 0.01,
        cache: str | None = None,
        cache_bytes: int = 64 << 30,
    ) -> None:
        super().__init__(
            shards=shards, val_shards=val_shards, val_samples=val_samples, batch_size=batch_size,
            global_batch_size=global_batch_size, default_batch_size=16, val_batch_size=val_batch_size,
            num_workers=num_workers, prefetch_factor=prefetch_factor, passes=passes, seed=seed,
            max_fault_share=max_fault_share, cache=cache, cache_bytes=cache_bytes,
        )  # fmt: skip
        self.sample_latents = sample_latents

    def check_sources(self, sources: Sequence[Source]) -> None:
        head = common_head(sources)
        names = {entry["bucket"] for source in sources for entry in source.index["shards"]}
        self.latent_shapes = {name: Bucket.parse(name).latent_shape(head["channels"]) for name in sorted(names)}
        self.text_width = head["text_width"]

    def make_dataset(self, sources: Sequence[Source]) -> LatentDataset:
        return LatentDataset(
            sources, sample_latents=self.sample_latents, store=self.store, max_fault_share=self.max_fault_share
        )

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        return Batch.collate(samples)

    def held_out_samples(self, positions: Sequence[int]) -> list[Sample]:
        return self.val_split.__getitems__(list(positions))


class VideoDataModule(ShardDataModule):
    """Clips for training a VAE: {"video": (B, 3, T, H, W) float32 in [-1, 1], "uid": (B,), "key": list of names}.

    Args:
        shards: video shards: folders, `.tar` files in them, wildcards, braces, or URLs of such.
        val_shards: validation clips; None takes the last `val_samples` of `shards`.
        val_samples: held-out clips if there are no `val_shards`, else how many of them are used.
        batch_size: clips per rank and step; 8 if `global_batch_size` is not given either.
        global_batch_size: clips per step over all ranks, instead of `batch_size`.
        val_batch_size: validation clips per rank and step.
        num_workers: loader processes; each decodes.
        prefetch_factor: batches that each of them holds ready.
        passes: how often a nominal epoch visits each clip.
        seed: of the order.
        frames: first frames of each clip's window.
        height: clips of another size are scaled and cropped about the centre.
        width: likewise.
        deadline: seconds that decoding a clip may take.
        max_fault_share: share of clips that may be damaged; they are named in the run's `faults.jsonl`.
        cache: local folder for what is read of remote shards; None keeps nothing.
        cache_bytes: its bound.
    """

    format = VIDEO_FORMAT

    def __init__(
        self,
        *,
        shards: str | list[str],
        val_shards: str | list[str] | None = None,
        val_samples: int = 16,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        val_batch_size: int = 8,
        num_workers: int = 0,
        prefetch_factor: int = 2,
        passes: int = 1,
        seed: int = 0,
        frames: int = 19,
        height: int = 64,
        width: int = 64,
        deadline: float = 60.0,
        max_fault_share: float = 0.01,
        cache: str | None = None,
        cache_bytes: int = 64 << 30,
    ) -> None:
        super().__init__(
            shards=shards, val_shards=val_shards, val_samples=val_samples, batch_size=batch_size,
            global_batch_size=global_batch_size, default_batch_size=8, val_batch_size=val_batch_size,
            num_workers=num_workers, prefetch_factor=prefetch_factor, passes=passes, seed=seed,
            max_fault_share=max_fault_share, cache=cache, cache_bytes=cache_bytes,
        )  # fmt: skip
        if min(frames, height, width) < 1:
            raise ValueError(
                f"got frames {frames}, height {height}, width {width}; expected at least 1 frame and 1 pixel each way."
            )
        self.frames, self.height, self.width = frames, height, width
        self.deadline = deadline

    def make_dataset(self, sources: Sequence[Source]) -> VideoDataset:
        return VideoDataset(
            sources, frames=self.frames, height=self.height, width=self.width, store=self.store,
            max_fault_share=self.max_fault_share, deadline=self.deadline,
        )  # fmt: skip

    @staticmethod
    def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """A batch of clips."""
        return {
            "video": torch.stack([sample["video"] for sample in samples]),
            "uid": torch.tensor([sample["uid"] for sample in samples]),
            "key": [sample["key"] for sample in samples],
            "faults": sum(sample["faults"] for sample in samples),
        }
