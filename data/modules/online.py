"""Clips that are encoded in the step: video shards in, the batches of latent shards out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.base_folder import read_base
from data.batch import Batch, Sample
from data.bucket import Bucket
from data.modules.latents import LatentSource
from data.shards.format import VIDEO_FORMAT
from data.stream.clips import Clip, ClipBatch, ClipDataset
from data.stream.latents import Normalise
from data.stream.shard_index import Source


class EncodingDataModule(LatentSource):
    """Video shards whose clips are encoded in the step, for sets too small to encode beforehand.

    Clips are decoded in the loader's processes; the encoders of the base run where the model does, without gradients,
    and every visit encodes again. Batches, and what is drawn, are those of `LatentDataModule` over the same clips.

    Args:
        shards: video shards: folders, `.tar` files in them, wildcards, braces, or URLs of such.
        base: diffusers pipeline folder with `vae`, `text_encoder` and `tokenizer`.
        val_shards: validation clips; None holds out the last samples of each bucket of `shards`.
        val_samples: as for `LatentDataModule`.
        batch_size: training samples per rank and step; 16 if `global_batch_size` is not given either.
        global_batch_size: training samples per step over all ranks, instead of `batch_size`.
        val_batch_size: validation samples per rank and step.
        num_workers: loader processes; each decodes.
        prefetch_factor: batches that each of them holds ready.
        passes: how often a nominal epoch visits each training clip.
        seed: of the order.
        sample_latents: draw latents from the VAE's posterior, keyed by uid, instead of taking its mean.
        dtype: of the encoders: float32, bfloat16 or float16.
        max_text_tokens: longer captions are cut.
        tiling: encode clip by clip and large frames in tiles: less memory, slightly other latents.
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
        base: str,
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
        dtype: str = "float32",
        max_text_tokens: int = 256,
        tiling: bool = False,
        deadline: float = 60.0,
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
        if dtype not in ("float32", "bfloat16", "float16") or max_text_tokens < 1:
            raise ValueError(
                f"got dtype {dtype!r}, max_text_tokens {max_text_tokens}; expected float32, bfloat16 or float16, and 1 "
                "token or more."
            )
        self.base = base
        self.sample_latents = sample_latents
        self.dtype, self.max_text_tokens, self.tiling = dtype, max_text_tokens, tiling
        self.deadline = deadline
        self._encoders: Any = None

    def check_sources(self, sources: Sequence[Source]) -> None:
        facts = read_base(Path(self.base))
        names = {entry["bucket"] for source in sources for entry in source.index["shards"]}
        self.latent_shapes = {name: Bucket.parse(name).latent_shape(facts.channels) for name in sorted(names)}
        self.text_width = facts.text_width
        self._normalise = Normalise(facts.mean, facts.std, sample=self.sample_latents)

    def make_dataset(self, sources: Sequence[Source]) -> ClipDataset:
        return ClipDataset(
            sources, store=self.store, max_fault_share=self.max_fault_share, deadline=self.deadline
        )  # fmt: skip

    @staticmethod
    def collate(samples: Sequence[Clip]) -> ClipBatch:
        return ClipBatch.collate(samples)

    def held_out_samples(self, positions: Sequence[int]) -> list[Sample]:
        clips = self.val_split.__getitems__(list(positions))
        device = self.trainer.strategy.root_device if self.trainer else "cpu"
        size = self.val_batch_size
        parts = [ClipBatch.collate(clips[first : first + size]) for first in range(0, len(clips), size)]
        return [sample for part in parts for sample in self._encode(part.to(device))]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Clips become latents and embeddings once they are on the device."""
        if not isinstance(batch, ClipBatch):
            return batch
        return Batch.collate(self._encode(batch)).to(batch.videos.device)

    def _encode(self, batch: ClipBatch) -> list[Sample]:
        from data.encode.encoders import Encoders  # diffusers and transformers, which nothing else here needs

        device = str(batch.videos.device)
        if self._encoders is None or self._encoders.device != device:
            self._encoders = Encoders(
                Path(self.base), device, getattr(torch, self.dtype), self.max_text_tokens, self.tiling
            )
        means, logvars = self._encoders.latents(batch.videos)
        texts = self._encoders.text([clip.caption for clip in batch.clips])
        return [
            Sample(self._normalise(mean, logvar, clip.uid), text.float(), clip.key, clip.uid, clip.faults, clip.counts)
            for clip, mean, logvar, text in zip(batch.clips, means, logvars, texts, strict=True)
        ]
