"""The probe set: held-out (latent, caption) at fixed sigmas with fixed noise, in batches that need no key mask.

Captions of a batch are of one length, so every attention weight of it counts.

Legend: P prompts, S sigmas, B probes of a batch.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from data.batch import Batch, Sample
from trainer.models.layout import AttentionCall
from trainer.objective import keyed_noise
from trainer.surgery import fingerprint

#: Mid-points of four equal bands of sigma.
SIGMAS = (0.125, 0.375, 0.625, 0.875)

#: A batch of probes holds at most so many latent cells (F * H * W), one probe at least.
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
        prompts: (B,) index of each probe's prompt in the probe set.
        strata: (B,) index of its sigma.
        batch: latents and captions, all captions of one length.
        noise: (B, C, F, H, W) float32.
        sigma: (B,) float32.
        identity: digest of all that a model computes from: the tensors of these probes, in this order.
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
    """Every prompt at every sigma, with one noise per prompt.

    Args:
        samples: the P prompts' samples.
        sigmas: the S sigmas.
        seed: of the noise, which is keyed by each sample's uid.
        batch_size: probes per batch; None chooses by the size of a latent.
        unconditional: leave out the captions: zero embedding and zero mask, as training drops them.

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
    ) -> None:
        if not samples:
            raise ValueError("got no probe samples, expected at least one held-out sample; enlarge the validation set.")
        self._captioned = list(samples)
        self.samples = [replace(s, text=s.text[:0]) for s in samples] if unconditional else list(samples)
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
        """Valid text tokens of each prompt."""
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
        """(prompt, stratum) of every probe, grouped into batches of captions of one length."""
        lengths = self.text_tokens
        groups = []
        for length in sorted(set(lengths)):
            same_length = [(p, s) for p, own in enumerate(lengths) if own == length for s in range(len(self.sigmas))]
            groups += [same_length[i : i + self.batch_size] for i in range(0, len(same_length), self.batch_size)]
        return groups

    def share(self, rank: int, world_size: int) -> Iterator[tuple[ProbeBatch, bool]]:
        """The batches of one rank, each with whether its results count.

        Batches do not depend on the number of ranks. Every rank gets equally many, since a sharded model computes only
        where all ranks do: where they do not divide, some are computed again and their results do not count.
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


def _identity(batch: Batch, noise: Tensor, sigma: Tensor) -> str:
    named = {"latents": batch.latents, "text": batch.text, "mask": batch.text_mask, "noise": noise, "sigma": sigma}
    return f"{fingerprint(named.items())} {batch.text_lengths}"


def refuse_key_mask(call: AttentionCall) -> None:
    """Raises ValueError if padded text keys would be measured as if they were attended to."""
    if call.layout.key_mask is not None:
        raise ValueError(
            f"got captions of {sorted(set(call.layout.text_lengths))} tokens in one batch, expected one length: "
            "attention is measured without a key mask. Group the probes by caption length."
        )
