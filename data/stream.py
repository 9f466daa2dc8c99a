"""Samples out of shards, read by offset without extraction.

Legend: C channels, F latent frames, H W latent grid, T video frames, L text tokens, D text width.
"""

import bisect
import json
import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor
from torch.utils.data import Dataset

from data.batch import Sample
from data.order import ResumableBatchSampler, epoch_order
from data.shards import LATENT_FORMAT, VIDEO_FORMAT, Member, list_samples, read_index, read_member
from data.video import decode_video

__all__ = ["LatentDataset", "ResumableBatchSampler", "ShardDataset", "VideoDataset", "epoch_order"]

log = logging.getLogger(__name__)
T = TypeVar("T")


@lru_cache(maxsize=512)
def _listing(path: Path) -> tuple[tuple[str, Mapping[str, Member]], ...]:
    """Headers of a shard, read once per process."""
    return tuple(list_samples(path).items())


class ShardDataset(Dataset[T], Generic[T]):
    """Samples of folders of shards, by number.

    A damaged sample is named in the log and its successor takes its place; past a share the run stops.

    Args:
        folders: of shards of one kind; read in this order.
        format: of their index.
        max_fault_share: share of samples that may be damaged.

    Raises:
        ValueError: if a folder holds no shards of this format.
    """

    def __init__(self, folders: Sequence[Path | str], format: str, *, max_fault_share: float = 0.01) -> None:
        self.folders = [Path(folder) for folder in folders]
        self.indices = [read_index(folder, format) for folder in self.folders]
        entries = [(f / s["name"], s["samples"]) for f, index in zip(self.folders, self.indices, strict=True)
                   for s in index["shards"]]  # fmt: skip
        self.shards = [path for path, _ in entries]
        self.shard_sizes = [samples for _, samples in entries]
        self.max_fault_share = max_fault_share
        self._starts = [0, *accumulate(self.shard_sizes)]
        self._faults: set[int] = set()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, number: int) -> T:
        return self.get(number, uid=number, among=range(len(self)))

    def get(self, number: int, uid: int, among: range) -> T:
        """Sample `number` under the name `uid`, which keys what is drawn for it.

        Args:
            number: of the sample.
            uid: what the sample is called.
            among: the split that a damaged sample's successor is taken from.

        Raises:
            ValueError: past the share of damaged samples.
        """
        if number not in among:
            raise IndexError(f"got sample {number}, expected one of {among}")
        for step in range(len(among)):
            candidate = among[(number - among.start + step) % len(among)]
            if candidate in self._faults:
                continue
            try:
                return self._read(candidate, uid)
            except (ValueError, KeyError, OSError, SafetensorError) as error:
                self._note_fault(candidate, error)
        raise ValueError(f"no sample of {[str(f) for f in self.folders]} can be read; make the shards again.")

    def _read(self, number: int, uid: int) -> T:
        shard = bisect.bisect_right(self._starts, number) - 1
        listing = _listing(self.shards[shard])
        place = number - self._starts[shard]
        if place >= len(listing):
            raise ValueError(f"{self.shards[shard]} holds {len(listing)} samples, its index says more; make it again")
        key, members = listing[place]
        return self.load(self.shards[shard], key, members, uid)

    def _note_fault(self, number: int, error: Exception) -> None:
        self._faults.add(number)
        log.warning("sample %d is damaged, its successor takes its place: %s", number, error)
        # One damaged sample is always let pass: the share of a small set would allow none.
        if len(self._faults) > max(1.0, self.max_fault_share * len(self)):
            raise ValueError(
                f"{len(self._faults)} of {len(self)} samples are damaged, more than max_fault_share "
                f"{self.max_fault_share} allows; the last: {error}. Find them with `reblock inspect --verify`."
            ) from error

    def load(self, shard: Path, key: str, members: Mapping[str, Member], uid: int) -> T:
        """Reads one sample."""
        raise NotImplementedError


class LatentDataset(ShardDataset[Sample]):
    """Normalised latents and caption embeddings.

    Args:
        folders: of latent shards.
        sample_latents: draw from the VAE's posterior, keyed by uid, instead of taking its mean.
        max_fault_share: share of samples that may be damaged.

    Raises:
        ValueError: if a folder holds no latent shards, or folders differ in shape, width or normalisation.
    """

    def __init__(
        self, folders: Sequence[Path | str], *, sample_latents: bool = False, max_fault_share: float = 0.01
    ) -> None:
        super().__init__(folders, LATENT_FORMAT, max_fault_share=max_fault_share)
        head = common_head(self.folders, self.indices)
        self.latent_shape: tuple[int, int, int, int] = tuple(head["latent_shape"])
        self.text_width: int = head["text_width"]
        self.mean = torch.tensor(head["latents_mean"]).view(-1, 1, 1, 1)
        self.std = torch.tensor(head["latents_std"]).view(-1, 1, 1, 1)
        self.sample_latents = sample_latents

    def load(self, shard: Path, key: str, members: Mapping[str, Member], uid: int) -> Sample:
        """One sample.

        Raises:
            ValueError: if its latent or its text has another shape than the index says, or is not finite.
        """
        tensors = load_safetensors(read_member(shard, members["safetensors"]))
        raw, text = tensors["mean"].float(), tensors["text"].float()
        if tuple(raw.shape) != self.latent_shape or text.ndim != 2 or text.shape[1] != self.text_width:
            raise ValueError(
                f"{shard}: {key} has latent {tuple(raw.shape)} and text {tuple(text.shape)}, expected "
                f"{self.latent_shape} and (length, {self.text_width})"
            )
        if self.sample_latents:
            raw = raw + torch.exp(0.5 * tensors["logvar"].float().clamp(-30, 20)) * _keyed_normal(uid, raw.shape)
        latent = (raw - self.mean) / self.std
        if not (torch.isfinite(latent).all() and torch.isfinite(text).all()):
            raise ValueError(f"{shard}: {key} holds numbers that are not finite")
        return Sample(latent=latent, text=text, key=key, uid=uid)


def _keyed_normal(uid: int, shape: Sequence[int]) -> Tensor:
    rng = np.random.default_rng([uid, 0x6C6174])  # apart from other draws keyed by uid
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def common_head(folders: Sequence[Path], indices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What latent folders must agree in.

    Raises:
        ValueError: if they do not.
    """
    fields = ("latent_shape", "text_width", "latents_mean", "latents_std")
    heads = [{field: index[field] for field in fields} for index in indices]
    for folder, head in zip(folders, heads, strict=True):
        for field in fields:
            if head[field] != heads[0][field]:
                raise ValueError(
                    f"{folder} has {field} {head[field]}, {folders[0]} has {heads[0][field]}; latent shards that are "
                    "trained on together must agree. Encode the clips to one size with one base."
                )
    return heads[0]


class VideoDataset(ShardDataset[dict[str, Any]]):
    """Decoded clips, for training a VAE: {"video": (3, T, H, W) float32 in [-1, 1], "uid", "key", "caption"}.

    Args:
        folders: of video shards.
        frames: first frames of each clip.
        height: clips of another size are scaled and cropped about the centre.
        width: likewise.
        max_fault_share: share of clips that may be damaged.
    """

    def __init__(
        self, folders: Sequence[Path | str], *, frames: int, height: int, width: int, max_fault_share: float = 0.01
    ) -> None:
        super().__init__(folders, VIDEO_FORMAT, max_fault_share=max_fault_share)
        self.frames, self.height, self.width = frames, height, width

    def load(self, shard: Path, key: str, members: Mapping[str, Member], uid: int) -> dict[str, Any]:
        """One clip.

        Raises:
            ValueError: if it cannot be decoded or is too short.
        """
        clip = read_clip(shard, members)
        video = decode_video(clip, self.frames, self.height, self.width)
        # In numpy: torch would use all cores for a small array, and several loaders then fight over them.
        pixels = np.ascontiguousarray(video.transpose(3, 0, 1, 2), dtype=np.float32) / np.float32(127.5) - np.float32(1)
        caption = read_member(shard, members["txt"]).decode()
        return {"video": torch.from_numpy(pixels), "uid": uid, "key": key, "caption": caption}


def read_clip(shard: Path, members: Mapping[str, Member]) -> bytes:
    """The video file of a sample: the member that is neither caption nor probe."""
    extensions = [extension for extension in members if extension not in ("txt", "json")]
    if len(extensions) != 1:
        raise ValueError(f"{shard} has a sample with members {sorted(members)}, expected one video, txt and json")
    return read_member(shard, members[extensions[0]])


def read_json(shard: Path, members: Mapping[str, Member]) -> dict[str, Any]:
    """The JSON member of a sample."""
    return json.loads(read_member(shard, members["json"]))
