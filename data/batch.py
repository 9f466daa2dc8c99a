"""Samples and batches of latents with their captions: what `data` hands to `trainer`.

Legend: B batch, C channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass
class Sample:
    """One latent with its caption, on the host.

    Args:
        latent: (C, F, H, W) float32, normalised with the VAE's mean and standard deviation.
        text: (length, D) caption embeddings, of Mochi, Wan 2.1 and HunyuanVideo without padding; length 0 for an empty
            caption of Mochi.
        key: name of the sample inside its shard.
        uid: stable index of the sample in its data set; noise is keyed by it.
        faults: damaged samples that were skipped before this one took their place.
        counts: whether it counts in an evaluation; false for a repetition that gives all ranks equally many samples.
        pooled: (D_pooled,) pooled caption embedding, for a family that takes one.
    """

    latent: Tensor
    text: Tensor
    key: str
    uid: int
    faults: int = 0
    counts: bool = True
    pooled: Tensor | None = None


@dataclass(frozen=True)
class EmptyCaption:
    """What the text encoders make of an empty text: in place of a caption, in a family trained so.

    Args:
        text: (length, D) float32 on the host, length 1 or more.
        pooled: (D_pooled,) float32, for a family that takes a pooled embedding.
    """

    text: Tensor
    pooled: Tensor | None = None


@dataclass
class Batch:
    """A collated batch.

    Text is padded only to the longest caption of the batch: Mochi drops padded tokens per sample. The lengths stay on
    the host, so that no step has to wait for the device to read them.

    Args:
        latents: (B, C, F, H, W) float32, normalised.
        text: (B, L, D) float32, zero past each caption's length; L >= 1.
        text_mask: (B, L) bool, true on valid tokens.
        text_lengths: valid tokens per sample, on the host.
        keys: sample names.
        uids: stable sample indices.
        counts: per sample, whether it counts in an evaluation.
        faults: damaged samples that were skipped for this batch.
        pooled: (B, D_pooled) float32 pooled caption embeddings, for a family that takes them.
    """

    latents: Tensor
    text: Tensor
    text_mask: Tensor
    text_lengths: tuple[int, ...]
    keys: tuple[str, ...]
    uids: tuple[int, ...]
    counts: tuple[bool, ...]
    faults: int = 0
    pooled: Tensor | None = None

    def __len__(self) -> int:
        return self.latents.shape[0]

    @classmethod
    def collate(cls, samples: Sequence[Sample]) -> "Batch":
        """Stacks samples of one latent shape; pads text with zeros to the longest caption."""
        shapes = {tuple(s.latent.shape) for s in samples}
        if len(shapes) != 1:
            raise ValueError(
                f"a batch needs latents of one shape; got {sorted(shapes)} from {[s.key for s in samples]}. "
                "Encode the clips to one resolution and length."
            )
        pooled = [s.pooled for s in samples if s.pooled is not None]
        if pooled and len(pooled) != len(samples):
            raise ValueError(
                f"a batch needs pooled captions for all samples or none; got {len(pooled)} of {len(samples)} from "
                f"{[s.key for s in samples]}. Encode the clips with one base."
            )
        lengths = tuple(int(s.text.shape[0]) for s in samples)
        longest = max(1, *lengths)
        text = torch.zeros(len(samples), longest, samples[0].text.shape[1])
        for row, sample in zip(text, samples, strict=True):
            row[: sample.text.shape[0]] = sample.text
        mask = torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]
        return cls(
            latents=torch.stack([s.latent for s in samples]).float(),
            text=text,
            text_mask=mask,
            text_lengths=lengths,
            keys=tuple(s.key for s in samples),
            uids=tuple(s.uid for s in samples),
            counts=tuple(s.counts for s in samples),
            faults=sum(s.faults for s in samples),
            pooled=torch.stack(pooled).float() if pooled else None,
        )

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "Batch":
        """The same batch with its tensors on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; the loader calls this."""
        return self._map(lambda t: t.pin_memory())

    def without_captions(self, dropped: Sequence[bool], *, keep_lengths: bool = False) -> "Batch":
        """The batch with the captions of `dropped` samples removed: zero embeddings, zero mask, length 0.

        Args:
            dropped: which samples.
            keep_lengths: leave as many tokens as before, all of them zero, for a model that attends to padding.
        """
        if not any(dropped):
            return self
        kept = torch.tensor([not drop for drop in dropped]).to(self.text.device, non_blocking=True)
        text = self.text.masked_fill(~kept[:, None, None], 0.0)
        if keep_lengths:
            return replace(self, text=text)
        return replace(
            self,
            text=text,
            text_mask=self.text_mask & kept[:, None],
            pooled=None if self.pooled is None else self.pooled.masked_fill(~kept[:, None], 0.0),
            text_lengths=tuple(0 if drop else n for drop, n in zip(dropped, self.text_lengths, strict=True)),
        )

    def with_empty_captions(self, dropped: Sequence[bool], empty: EmptyCaption) -> "Batch":
        """The batch with the captions of `dropped` samples replaced by the encoded empty one."""
        if not any(dropped):
            return self
        device, length = self.text.device, len(empty.text)
        longest = max(length, self.text.shape[1])
        lengths = tuple(length if drop else n for drop, n in zip(dropped, self.text_lengths, strict=True))
        rows = torch.tensor(dropped).to(device, non_blocking=True)
        mask = (torch.arange(longest)[None, :] < torch.tensor(lengths)[:, None]).to(device, non_blocking=True)
        new, text = (_padded(t.to(device, non_blocking=True), longest) for t in (empty.text, self.text))
        pooled = self.pooled
        if pooled is not None:
            assert empty.pooled is not None
            pooled = torch.where(rows[:, None], empty.pooled.to(device, non_blocking=True), pooled)
        text = torch.where(rows[:, None, None], new, text)
        return replace(self, text=text, text_mask=mask, text_lengths=lengths, pooled=pooled)

    def _map(self, fn: Callable[[Tensor], Tensor]) -> "Batch":
        pooled = None if self.pooled is None else fn(self.pooled)
        return replace(self, latents=fn(self.latents), text=fn(self.text), text_mask=fn(self.text_mask), pooled=pooled)


def _padded(text: Tensor, length: int) -> Tensor:
    """Embeddings (..., L, D) padded with zeros to (..., length, D)."""
    return torch.nn.functional.pad(text, (0, 0, 0, length - text.shape[-2]))
