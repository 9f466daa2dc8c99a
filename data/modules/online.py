"""Clips that are encoded in the training step: video shards in, the batches of latent shards out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data.base_facts import read_base
from data.base_folder import resolve_base
from data.batch import Batch, EmptyCaption, Sample
from data.bucket import Bucket
from data.encode.family_checks import check_sizes, check_text_tokens
from data.modules.latents import BatchDataModule
from data.shards.format import VIDEO_FORMAT
from data.stream.clips import ClipBatch, ClipReader, ClipSample
from data.stream.latents import Normaliser
from data.stream.shard_index import IndexedShards, bucket_names


class EncodingDataModule(BatchDataModule):
    """Video shards whose clips are encoded in the step, for sets too small to encode beforehand.

    Clips are decoded in the loader's processes; the encoders of the base run where the model does, without gradients,
    and every visit encodes again. Batches, and what is drawn, are those of `LatentDataModule` over the same clips.

    Args:
        base: diffusers pipeline folder with `vae`, `text_encoder` and `tokenizer`, or its downloaded hub id.
        sample_latents: draw latents from the VAE's posterior, as `LatentDataModule` does, instead of taking its mean.
        dtype: of the VAE: float32, bfloat16 or float16.
        text_dtype: of the text encoders, likewise; Mochi was trained with float32.
        max_text_tokens: longer captions are cut; None takes the family's length.
        tiling: encode clip by clip and large frames in tiles: less memory, slightly other latents.
        deadline: seconds that decoding a clip may take.
        stream: the fields of `StreamConfig`; `shards` are video shards.

    Raises:
        ValueError: for another dtype, or no token.
    """

    format = VIDEO_FORMAT

    def __init__(
        self,
        *,
        base: str,
        sample_latents: bool = False,
        dtype: str = "float32",
        text_dtype: str = "float32",
        max_text_tokens: int | None = None,
        tiling: bool = False,
        deadline: float = 60.0,
        **stream: Any,
    ) -> None:
        super().__init__(**stream)
        if not {dtype, text_dtype} <= {"float32", "bfloat16", "float16"} or (
            max_text_tokens is not None and max_text_tokens < 1
        ):
            raise ValueError(
                f"got dtype {dtype!r}, text_dtype {text_dtype!r}, max_text_tokens {max_text_tokens}; expected float32, "
                "bfloat16 or float16, and 1 token or more."
            )
        self.base = base
        self.sample_latents = sample_latents
        self.dtype, self.text_dtype, self.max_text_tokens, self.tiling = dtype, text_dtype, max_text_tokens, tiling
        self.deadline = deadline
        self._encoders: Any = None

    def check_shards(self, shards: Sequence[IndexedShards]) -> None:
        facts = read_base(resolve_base(self.base))
        self.family = facts.family
        self._text_tokens = check_text_tokens(facts.family, facts.text_tokens, self.max_text_tokens)
        check_sizes(shards, facts.family)
        self.latent_shapes = {
            name: Bucket.parse(name, facts.family.name).latent_shape(facts.channels) for name in bucket_names(shards)
        }
        self.text_width, self.pooled_width = facts.text_width, facts.pooled_width
        self.normalisation = facts.mean, facts.std
        self._normalise = Normaliser(facts.mean, facts.std, sample=self.sample_latents)

    def make_reader(self, shards: Sequence[IndexedShards]) -> ClipReader:
        return ClipReader(
            shards, store=self.store, max_fault_share=self.config.max_fault_share, deadline=self.deadline
        )  # fmt: skip

    @staticmethod
    def collate(samples: Sequence[ClipSample]) -> ClipBatch:
        return ClipBatch.collate(samples)

    @property
    def _device(self) -> torch.device:
        return self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

    def empty_caption(self) -> EmptyCaption:
        self.check()
        encoders = self._encoders_on(str(self._device))
        (text,), (pooled,) = encoders.text([""]), encoders.pooled([""])
        # Copies: the encoders' tensors are of the inference mode.
        return EmptyCaption(text.float().clone(), None if pooled is None else pooled.float().clone())

    def held_out_samples(self, positions: Sequence[int]) -> list[Sample]:
        clips, device = self.val_split.__getitems__(list(positions)), self._device
        size = self.config.val_batch_size
        parts = [ClipBatch.collate(clips[first : first + size]) for first in range(0, len(clips), size)]
        return [sample for part in parts for sample in self._encode(part.to(device))]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Encodes clips once they are on the device."""
        if not isinstance(batch, ClipBatch):
            return batch
        return Batch.collate(self._encode(batch)).to(batch.videos.device)

    def _encoders_on(self, device: str) -> Any:
        from data.encode.encoders import Encoders  # diffusers and transformers, which nothing else here needs

        if self._encoders is None or self._encoders.device != device:
            self._encoders = Encoders(
                Path(self.base), device, getattr(torch, self.dtype), self._text_tokens, self.tiling,
                getattr(torch, self.text_dtype),
            )  # fmt: skip
        return self._encoders

    def _encode(self, batch: ClipBatch) -> list[Sample]:
        encoders = self._encoders_on(str(batch.videos.device))
        means, logvars = encoders.latents(batch.videos)
        captions = [clip.caption for clip in batch.clips]
        texts, pooled = encoders.text(captions), encoders.pooled(captions)
        return [
            Sample(
                self._normalise(mean, logvar, clip.visit),
                text.float(),
                clip.key,
                clip.visit.uid,
                clip.faults,
                clip.counts,
                None if whole is None else whole.float(),
            )
            for clip, mean, logvar, text, whole in zip(batch.clips, means, logvars, texts, pooled, strict=True)
        ]
