"""The probe set: held-out (latent, caption) at fixed sigmas with fixed noise, in batches that need no key mask.

All captions of a batch have the same length, so no key is padding and every attention weight is valid.

Legend: P prompts, S sigmas, B probes of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from data.batch import Batch, EmptyCaption, Sample
from trainer.models.layout import AttentionCall
from trainer.objective import keyed_noise
from trainer.surgery import fingerprint

#: Mid-points of four equal bands of sigma.
SIGMAS = (0.125, 0.375, 0.625, 0.875)

#: Largest number of latent cells (F * H * W) in a batch of probes; a batch has at least one probe.
_CELLS = 2**14


@runtime_checkable
class ProbeSource(Protocol):
    """What a data module must offer for measurements."""

    def probe_samples(self, count: int) -> list[Sample]:
        """At most `count` held-out samples, the same on every rank and in every epoch."""
        ...


@dataclass(frozen=True)
class ProbeBatch:
    """Probes that are measured together.

    Args:
        prompts: index of each probe's prompt in the probe set, (B,).
        strata: index of each probe's sigma in the probe set, (B,).
        batch: latents and captions; all captions have the same length.
        noise: noise of each probe, (B, C, F, H, W) float32.
        sigma: noise level of each probe, (B,) float32.
        identity: digest of the model's inputs: the tensors of these probes in this order.
    """

    prompts: tuple[int, ...]
    strata: tuple[int, ...]
    batch: Batch
    noise: Tensor
    sigma: Tensor
    identity: str

    def to(self, device: torch.device | str) -> "ProbeBatch":
        """The same probes with their tensors on `device`."""
        return replace(self, batch=self.batch.to(device), noise=self.noise.to(device), sigma=self.sigma.to(device))


class ProbeSet:
    """Every prompt at every sigma, with one noise tensor per prompt.

    Args:
        samples: samples of the P prompts.
        sigmas: the S noise levels.
        seed: seed of the noise, which also depends on each sample's uid.
        batch_size: number of probes per batch; None chooses it by the size of a latent.
        unconditional: whether to leave out the captions, as training drops them: no tokens, unless one of the next two
            says otherwise.
        keep_lengths: leave zeros in as many places, for a model that attends to padding.
        empty: takes the place of captions that are left out, for a family whose empty caption is an encoded one.

    Raises:
        ValueError: if there are no samples.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        sigmas: Sequence[float],
        *,
        seed: int,
        batch_size: int | None = None,
        unconditional: bool = False,
        keep_lengths: bool = False,
        empty: EmptyCaption | None = None,
    ) -> None:
        if not samples:
            raise ValueError("got no probe samples, expected at least one held-out sample; enlarge the validation set.")
        self._captioned = list(samples)
        self.samples = [_bare(s, keep_lengths, empty) for s in samples] if unconditional else list(samples)
        self.sigmas = tuple(sigmas)
        self.seed = seed
        self.batch_size = batch_size or max(1, _CELLS // math.prod(samples[0].latent.shape[1:]))

    def __len__(self) -> int:
        return len(self.samples) * len(self.sigmas)

    @property
    def keys(self) -> list[str]:
        """Names of the prompts' samples."""
        return [sample.key for sample in self.samples]

    @property
    def text_tokens(self) -> list[int]:
        """Number of valid text tokens of each prompt, (P,)."""
        return [int(sample.text.shape[0]) for sample in self.samples]

    @cached_property
    def caption_ids(self) -> list[int]:
        """A number for each sample; samples of one caption, by its embedding, share it, even if captions are left out.

        They are no independent draws of a prompt. Empty captions are told apart: then only the clips differ.
        """
        texts = [
            fingerprint([("text", sample.text)]) if len(sample.text) else str(index)
            for index, sample in enumerate(self._captioned)
        ]
        return [texts.index(text) for text in texts]

    def groups(self) -> list[list[tuple[int, int]]]:
        """(prompt index, sigma index) of every probe, grouped into batches with captions of one length."""
        lengths = self.text_tokens
        groups = []
        for length in sorted(set(lengths)):
            same_length = [(p, s) for p, own in enumerate(lengths) if own == length for s in range(len(self.sigmas))]
            groups += [same_length[i : i + self.batch_size] for i in range(0, len(same_length), self.batch_size)]
        return groups

    def share(self, rank: int, world_size: int) -> Iterator[tuple[ProbeBatch, bool]]:
        """Yields the batches of one rank, each with whether its results count.

        Batches do not depend on the number of ranks. A sharded model needs all ranks for each forward pass, so every
        rank gets the same number of batches. Some batches are repeated for that; their second results do not count.
        """
        groups = self.groups()
        for turn in range(math.ceil(len(groups) / world_size)):
            index = turn * world_size + rank
            yield self._collate(groups[index % len(groups)]), index < len(groups)

    def _collate(self, group: Sequence[tuple[int, int]]) -> ProbeBatch:
        prompts, strata = zip(*group, strict=True)
        batch = Batch.collate([self.samples[p] for p in prompts])
        noise = keyed_noise(self.seed, 0, batch.uids, batch.latents.shape[1:])
        sigma = torch.tensor([self.sigmas[s] for s in strata])
        return ProbeBatch(prompts, strata, batch, noise, sigma, _identity(batch, noise, sigma))


def _bare(sample: Sample, keep_lengths: bool, empty: EmptyCaption | None) -> Sample:
    if empty is not None:
        return replace(sample, text=empty.text, pooled=empty.pooled)
    return replace(sample, text=torch.zeros_like(sample.text) if keep_lengths else sample.text[:0])


def _identity(batch: Batch, noise: Tensor, sigma: Tensor) -> str:
    named = {"latents": batch.latents, "text": batch.text, "mask": batch.text_mask, "noise": noise, "sigma": sigma}
    if batch.pooled is not None:
        named["pooled"] = batch.pooled
    return f"{fingerprint(named.items())} {batch.text_lengths}"


def refuse_key_mask(call: AttentionCall) -> None:
    """Raises ValueError if the call has a key mask, since measurements would count padded text keys."""
    if call.layout.key_mask is not None:
        raise ValueError(
            f"got captions of {sorted(set(call.layout.text_lengths))} tokens in one batch, expected one length: "
            "attention is measured without a key mask. Group the probes by caption length."
        )
