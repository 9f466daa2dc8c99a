"""Data modules for training a transformer: batches are `data.batch.Batch`.

Legend: C channels, F latent frames, H W latent grid.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from data.batch import Batch, EmptyCaption, Sample
from data.bucket import Bucket
from data.families import VideoFamily, family_named
from data.modules.shard_module import ShardDataModule
from data.shards.empty_caption import read_empty_caption
from data.shards.format import LATENT_FORMAT
from data.stream.latents import LatentReader, common_fields
from data.stream.order import BatchGroup
from data.stream.shard_index import IndexedShards, bucket_names


class BatchDataModule(ShardDataModule):
    """A data module whose batches are `data.batch.Batch`; its validation samples can serve as probes.

    `check` sets `latent_shapes`, bucket name -> (C, F, H, W), `text_width`, `pooled_width` (None for captions
    without a pooled embedding), `family`, the family of models that the latents are for, `normalisation`, mean and
    deviation per channel by which raw latents were normalised, and `encoders`, fingerprints of the bases that made the
    shards, where these say it.
    """

    latent_shapes: dict[str, tuple[int, int, int, int]]
    text_width: int
    pooled_width: int | None
    family: VideoFamily
    normalisation: tuple[list[float], list[float]]
    encoders: frozenset[str] = frozenset()

    @property
    def probe_bucket(self) -> Bucket:
        """The bucket that probes come from: that of most validation samples, of equals the largest."""
        groups = [(len(group), Bucket.parse(group.name, self.family.name)) for group in self.val_split.groups]
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

    def check_probes(self, count: int) -> BatchGroup:
        """The group that probes come from, checked before a model is loaded.

        Raises:
            ValueError: if it has fewer than `count` samples.
        """
        name = self.probe_bucket.name
        group = next(group for group in self.val_split.groups if group.name == name)
        if not 1 <= count <= len(group):
            raise ValueError(
                f"got {count} probe samples, expected 1 to {len(group)}, the validation samples of bucket {name}; "
                "lower the number of probes, or raise data.val_samples."
            )
        return group

    def check_empty_caption(self) -> None:
        """Checks that `empty_caption` gives one, before a model is loaded.

        Raises:
            ValueError: if it does not.
            StoreError: if a store does not answer.
        """

    @abstractmethod
    def empty_caption(self) -> EmptyCaption:
        """What the text encoders make of an empty text: the same on every rank and in every epoch.

        Raises:
            ValueError: if the shards hold none.
        """

    @abstractmethod
    def held_out_samples(self, positions: Sequence[int]) -> list[Sample]:
        """Validation samples by position."""


class LatentDataModule(BatchDataModule):
    """Latents and captions for training a transformer; batches are `data.batch.Batch`.

    Args:
        sample_latents: draw latents from the VAE's posterior instead of taking its mean: anew for each visit, keyed by
            (seed, epoch, uid); those of validation and probes are always the same.
        stream: the fields of `StreamConfig`; `shards` are latent shards.
    """

    format = LATENT_FORMAT

    def __init__(self, *, sample_latents: bool = False, **stream: Any) -> None:
        super().__init__(**stream)
        self.sample_latents = sample_latents

    def check_shards(self, shards: Sequence[IndexedShards]) -> None:
        fields = common_fields(shards)
        self.family = family_named(fields["family"])
        self.latent_shapes = {
            name: Bucket.parse(name, self.family.name).latent_shape(fields["channels"]) for name in bucket_names(shards)
        }
        self.text_width, self.pooled_width = fields["text_width"], fields["pooled_width"]
        self.normalisation = fields["latents_mean"], fields["latents_std"]
        made_by = [source.index.get("settings", {}).get("base") for source in shards]
        self.encoders = frozenset(name for name in made_by if name is not None)

    def make_reader(self, shards: Sequence[IndexedShards]) -> LatentReader:
        return LatentReader(
            shards, sample_latents=self.sample_latents, store=self.store, max_fault_share=self.config.max_fault_share
        )

    @staticmethod
    def collate(samples: Sequence[Sample]) -> Batch:
        return Batch.collate(samples)

    def held_out_samples(self, positions: Sequence[int]) -> list[Sample]:
        return self.val_split.__getitems__(list(positions))

    def check_empty_caption(self) -> None:
        self.empty_caption()

    def empty_caption(self) -> EmptyCaption:
        self.check()
        assert self._splits is not None
        folders = self._splits[0].reader.folders  # validation leaves out no caption
        captions = [read_empty_caption(source.folder, source.index, self.store) for source in folders]
        # Of several folders the first one's: precisions may differ, the number of tokens of one encoder does not.
        for source, caption in zip(folders, captions, strict=True):
            if caption.text.shape != captions[0].text.shape:
                raise ValueError(
                    f"the empty caption of {source.folder} has {len(caption.text)} tokens, that of "
                    f"{folders[0].folder} {len(captions[0].text)}; latent shards that are trained on together "
                    "must agree. Encode the clips with one base."
                )
        return captions[0]
