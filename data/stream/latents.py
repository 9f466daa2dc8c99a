"""Reads latents and caption embeddings for training: drawn from the posterior, normalised and checked.

Legend: C channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor

from data.batch import Sample
from data.bucket import Bucket
from data.shards.format import LATENT_FORMAT
from data.storage.store import Store
from data.stream.reader import ShardReader, Visit
from data.stream.shard_index import IndexedShards

#: Separates draws from the posterior from other draws with a seed from the visit.
_LATENT = 0x6C6174

#: Fields of the index that must be equal in all latent folders of one run.
_COMMON_FIELDS = ("channels", "text_width", "latents_mean", "latents_std")


class Normaliser:
    """Normalises raw latents to mean 0 and standard deviation 1 per channel, as the transformer expects.

    Args:
        mean: (C,) mean of raw latents.
        std: (C,) standard deviation of raw latents.
        sample: whether to draw from the posterior, with a seed from the visit, instead of taking its mean.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, sample: bool) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1, 1)
        self.sample = sample

    def __call__(self, mean: Tensor, logvar: Tensor | None, visit: Visit) -> Tensor:
        """Normalised latent, (C, F, H, W) float32, from the raw mean and log-variance of the posterior."""
        raw = mean.float()
        if self.sample:
            assert logvar is not None
            raw = raw + torch.exp(0.5 * logvar.float().clamp(-30, 20)) * _keyed_normal(visit, raw.shape)
        return (raw - self.mean) / self.std


def _keyed_normal(visit: Visit, shape: Sequence[int]) -> Tensor:
    rng = np.random.default_rng([visit.uid, _LATENT] if visit.draw is None else [_LATENT, *visit.draw, visit.uid])
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def _finite(values: Tensor) -> bool:
    """Whether all values are finite. Tests their sum first, which is several times faster."""
    return math.isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


class LatentReader(ShardReader[Sample]):
    """Reads normalised latents and caption embeddings.

    Args:
        locations: latent shards (folders, `.tar` files in them, wildcards, braces, URLs), or `IndexedShards`.
        sample_latents: whether to draw from the VAE's posterior, seeded from the visit, instead of taking its mean.
        store: store that reads the shards.
        max_fault_share: share of samples that may be damaged, 0 to 1.

    Raises:
        ValueError: if there are no latent shards, or if folders differ in channels, text width or normalisation.
    """

    extensions = ("safetensors", "text")

    def __init__(
        self,
        locations: Sequence[Any],
        *,
        sample_latents: bool = False,
        store: Store | None = None,
        max_fault_share: float = 0.01,
    ) -> None:
        super().__init__(locations, LATENT_FORMAT, store=store, max_fault_share=max_fault_share)
        fields = common_fields(self.folders)
        self.text_width: int = fields["text_width"]
        self.pooled_width: int | None = fields["pooled_width"]
        self.latent_shapes = {bucket.name: bucket.latent_shape(fields["channels"]) for bucket in set(self.buckets)}
        self._shapes = set(self.latent_shapes.values())
        self.normalise = Normaliser(fields["latents_mean"], fields["latents_std"], sample=sample_latents)

    def decode(self, key: str, files: Mapping[str, bytes], visit: Visit, bucket: Bucket | None = None) -> Sample:
        tensors, caption = load_safetensors(files["safetensors"]), load_safetensors(files["text"])
        text, pooled = caption["text"], None if self.pooled_width is None else caption["pooled"].float()
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
        if pooled is not None and tuple(pooled.shape) != (self.pooled_width,):
            raise ValueError(f"its pooled text is {tuple(pooled.shape)}, expected ({self.pooled_width},)")
        logvar = tensors["logvar"] if self.normalise.sample else None
        if logvar is not None and tuple(logvar.shape) != shape:
            raise ValueError(f"its logvar is {tuple(logvar.shape)}, expected {shape}")
        normalised, text = self.normalise(mean, logvar, visit), text.float()
        if not (_finite(normalised) and _finite(text) and (pooled is None or _finite(pooled))):
            raise ValueError("it holds numbers that are not finite")
        return Sample(latent=normalised, text=text, key=key, uid=visit.uid, pooled=pooled)


def common_fields(folders: Sequence[IndexedShards]) -> dict[str, Any]:
    """The fields of the index that all latent folders share: channels, widths, means and deviations, family.

    Raises:
        ValueError: if a field is missing, or differs between folders.
    """
    found: list[dict[str, Any]] = [
        {"family": folder.family.name} | {field: folder.index.get(field) for field in _COMMON_FIELDS}
        for folder in folders
    ]
    for folder, fields in zip(folders, found, strict=True):
        fields["pooled_width"] = folder.index.get("pooled_width")
        if folder.family.has_pooled and fields["pooled_width"] is None:
            raise ValueError(
                f"{folder.folder}/index.json lacks 'pooled_width': its captions have no pooled embedding, which "
                f"{folder.family.title} needs. Make the shards again with `reblock encode`."
            )
    for folder, fields in zip(folders, found, strict=True):
        for field in fields:
            if fields[field] is None and field != "pooled_width":
                raise ValueError(f"{folder.folder}/index.json lacks {field!r}; make it again with `reblock encode`.")
            if fields[field] != found[0][field]:
                raise ValueError(
                    f"{folder.folder} has {field} {fields[field]}, {folders[0].folder} has {found[0][field]}; latent "
                    "shards that are trained on together must agree. Encode the clips with one base."
                )
        if len(fields["latents_mean"]) != fields["channels"] or len(fields["latents_std"]) != fields["channels"]:
            raise ValueError(
                f"{folder.folder}/index.json has {len(fields['latents_mean'])} means and {len(fields['latents_std'])} "
                f"deviations for {fields['channels']} channels; make it again with `reblock encode`."
            )
    return found[0]
