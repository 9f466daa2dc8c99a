"""Latents and captions as training takes them: normalised, drawn from the posterior, checked.

Legend: C channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from data.batch import Sample
from data.bucket import Bucket
from data.shards.format import LATENT_FORMAT, Members
from data.storage.store import Store
from data.stream.reader import ShardDataset
from data.stream.shard_index import Source, read_near

#: What latent folders that are trained on together must agree in.
_HEAD = ("channels", "text_width", "latents_mean", "latents_std")


class Normalise:
    """Raw latents to those of mean 0 and deviation 1 per channel, as the transformer takes them.

    Args:
        mean: per channel, of raw latents.
        std: per channel, of raw latents.
        sample: draw from the posterior, keyed by uid, instead of taking its mean.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, sample: bool) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1, 1)
        self.sample = sample

    def __call__(self, mean: Tensor, logvar: Tensor | None, uid: int) -> Tensor:
        """(C, F, H, W) float32 of a posterior's mean and log-variance, both raw."""
        raw = mean.float()
        if self.sample:
            assert logvar is not None
            raw = raw + torch.exp(0.5 * logvar.float().clamp(-30, 20)) * _keyed_normal(uid, raw.shape)
        return (raw - self.mean) / self.std


def _keyed_normal(uid: int, shape: Sequence[int]) -> Tensor:
    rng = np.random.default_rng([uid, 0x6C6174])  # apart from other draws keyed by uid
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def _finite(values: Tensor) -> bool:
    """Whether all numbers are finite: where their sum is, they are, and adding up is several times faster."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


class LatentDataset(ShardDataset[Sample]):
    """Normalised latents and caption embeddings.

    Args:
        locations: of latent shards (folders, `.tar` files, wildcards, braces, URLs), or sources that were found.
        sample_latents: draw from the VAE's posterior, keyed by uid, instead of taking its mean.
        store: that reads them.
        max_fault_share: share of samples that may be damaged.

    Raises:
        ValueError: if there are no latent shards, or folders differ in channels, width or normalisation.
    """

    def __init__(
        self,
        locations: Sequence[Any],
        *,
        sample_latents: bool = False,
        store: Store | None = None,
        max_fault_share: float = 0.01,
    ) -> None:
        super().__init__(locations, LATENT_FORMAT, store=store, max_fault_share=max_fault_share)
        head = common_head(self.sources)
        self.text_width: int = head["text_width"]
        self.latent_shapes = {bucket.name: bucket.latent_shape(head["channels"]) for bucket in set(self.buckets)}
        self._shapes = set(self.latent_shapes.values())
        self.normalise = Normalise(head["latents_mean"], head["latents_std"], sample=sample_latents)

    def load(self, shard: str, key: str, members: Members, uid: int, bucket: Bucket | None = None) -> Sample:
        """One sample.

        Raises:
            ValueError: if its latent or its text has another shape than its bucket says, or is not finite.
            KeyError: if a member or a tensor is missing.
            OSError, SafetensorError: if it cannot be read.
        """
        latent, embedding = read_near(shard, [members["safetensors"], members["text"]], self.store)
        tensors, text = load_safetensors(latent), load_safetensors(embedding)["text"]
        mean = tensors["mean"]
        shape = self.latent_shapes[bucket.name] if bucket else tuple(mean.shape)
        if (
            tuple(mean.shape) != shape
            or shape not in self._shapes
            or text.ndim != 2
            or text.shape[1] != self.text_width
        ):
            raise ValueError(
                f"its latent is {tuple(mean.shape)} and its text {tuple(text.shape)}, expected "
                f"{shape if bucket else sorted(self._shapes)} and (length, {self.text_width})"
            )
        drawn = tensors["logvar"] if self.normalise.sample else None
        if drawn is not None and tuple(drawn.shape) != shape:
            raise ValueError(f"its logvar is {tuple(drawn.shape)}, expected {shape}")
        normalised, text = self.normalise(mean, drawn, uid), text.float()
        if not (_finite(normalised) and _finite(text)):
            raise ValueError("it holds numbers that are not finite")
        return Sample(latent=normalised, text=text, key=key, uid=uid)

    def mark(self, sample: Sample, faults: int, counts: bool) -> None:
        sample.faults, sample.counts = faults, counts


def common_head(sources: Sequence[Source]) -> dict[str, Any]:
    """What latent folders must agree in.

    Raises:
        ValueError: if they do not.
    """
    heads: list[dict[str, Any]] = [{field: source.index.get(field) for field in _HEAD} for source in sources]
    for source, head in zip(sources, heads, strict=True):
        for field in _HEAD:
            if head[field] is None:
                raise ValueError(f"{source.folder}/index.json lacks {field!r}; make it again with `reblock encode`.")
            if head[field] != heads[0][field]:
                raise ValueError(
                    f"{source.folder} has {field} {head[field]}, {sources[0].folder} has {heads[0][field]}; latent "
                    "shards that are trained on together must agree. Encode the clips with one base."
                )
        if len(head["latents_mean"]) != head["channels"] or len(head["latents_std"]) != head["channels"]:
            raise ValueError(
                f"{source.folder}/index.json has {len(head['latents_mean'])} means and {len(head['latents_std'])} "
                f"deviations for {head['channels']} channels; make it again with `reblock encode`."
            )
    return heads[0]
