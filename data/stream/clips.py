"""Clips out of video shards, decoded in the loader's processes.

Legend: B batch, T video frames, H W pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.bucket import Bucket
from data.shards.format import VIDEO_FORMAT, Members, read_clip, read_json, read_member
from data.storage.store import Store
from data.stream.reader import ShardDataset
from data.video.decode import decode_video
from data.video.isolated_call import IsolatedCall


@dataclass
class Clip:
    """A decoded clip with its caption.

    Args:
        video: (T, H, W, 3) uint8.
        caption: of the clip.
        key: name of the sample inside its shard.
        uid: of the visit; what is drawn for it is keyed by this.
        faults: damaged samples that it stands for.
        counts: whether it counts in an evaluation.
    """

    video: Tensor
    caption: str
    key: str
    uid: int
    faults: int = 0
    counts: bool = True


@dataclass
class ClipBatch:
    """Clips of one size; `videos` (B, T, H, W, 3) uint8."""

    videos: Tensor
    clips: tuple[Clip, ...]

    @classmethod
    def collate(cls, clips: Sequence[Clip]) -> "ClipBatch":
        """Stacks clips of one bucket."""
        videos = torch.stack([clip.video for clip in clips])
        return cls(videos, tuple(replace(clip, video=videos[0, :0]) for clip in clips))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "ClipBatch":
        """The same batch with its videos on `device`."""
        return replace(self, videos=self.videos.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ClipBatch":
        """The same batch in page-locked memory; the loader calls this."""
        return replace(self, videos=self.videos.pin_memory())


def read_window(shard: str, members: Members, store: Store, frames: int | None = None) -> list[int]:
    """The first `frames` frame indices of a clip's window; all of them without.

    Raises:
        ValueError: if its facts hold no such window.
    """
    indices = read_json(shard, members, store).get("indices")
    least = frames or 1
    if not isinstance(indices, list) or len(indices) < least or not all(type(i) is int and i >= 0 for i in indices):
        held = f"of {len(indices)}" if isinstance(indices, list) else "without"
        raise ValueError(f"its json holds a window {held} frame indices, expected {least} or more")
    return indices[:frames]


def _decode(task: tuple[bytes, list[int], int, int]) -> NDArray[np.uint8]:
    """(T, H, W, 3) of (clip, indices, H, W), in a process that can be killed."""
    content, indices, height, width = task
    return np.ascontiguousarray(decode_video(content, indices, height, width))


class ClipDataset(ShardDataset[Clip]):
    """Clips as `reblock encode` sees them: the window that packing chose, in the size of their bucket.

    Args:
        locations: of video shards.
        store: that reads them.
        max_fault_share: share of clips that may be damaged.
        deadline: seconds that decoding a clip may take.
    """

    def __init__(
        self,
        locations: Sequence[Any],
        *,
        store: Store | None = None,
        max_fault_share: float = 0.01,
        deadline: float = 60.0,
    ) -> None:
        super().__init__(locations, VIDEO_FORMAT, store=store, max_fault_share=max_fault_share)
        self._isolated_call = IsolatedCall(deadline)

    def load(self, shard: str, key: str, members: Members, uid: int, bucket: Bucket | None = None) -> Clip:
        """One clip.

        Raises:
            ValueError, KeyError, OSError: if it cannot be read or decoded.
        """
        bucket = bucket or Bucket.parse(str(read_json(shard, members, self.store).get("bucket")))
        window = read_window(shard, members, self.store, bucket.frames)
        clip = read_clip(shard, members, self.store)
        video = self._isolated_call(_decode, (clip, window, bucket.height, bucket.width))
        caption = read_member(shard, members["txt"], self.store).decode()
        return Clip(torch.from_numpy(video), caption, key, uid)

    def mark(self, sample: Clip, faults: int, counts: bool) -> None:
        sample.faults, sample.counts = faults, counts


class VideoDataset(ShardDataset[dict[str, Any]]):
    """Clips for training a VAE: {"video": (3, T, H, W) float32 in [-1, 1], "uid", "key", "caption"}.

    All buckets are brought to one size.

    Args:
        locations: of video shards.
        frames: first frames of each clip's window.
        height: clips of another size are scaled and cropped about the centre.
        width: likewise.
        store: that reads them.
        max_fault_share: share of clips that may be damaged.
        deadline: seconds that decoding a clip may take.
    """

    grouped = False

    def __init__(
        self,
        locations: Sequence[Any],
        *,
        frames: int,
        height: int,
        width: int,
        store: Store | None = None,
        max_fault_share: float = 0.01,
        deadline: float = 60.0,
    ) -> None:
        super().__init__(locations, VIDEO_FORMAT, store=store, max_fault_share=max_fault_share)
        self._isolated_call = IsolatedCall(deadline)
        self.frames, self.height, self.width = frames, height, width
        short = sorted({b.name for b in self.buckets if b.frames < frames})
        if short:
            raise ValueError(f"got frames {frames}, the shards' buckets {short} have fewer; lower data.frames.")

    def load(self, shard: str, key: str, members: Members, uid: int, bucket: Bucket | None = None) -> dict[str, Any]:
        """One clip.

        Raises:
            ValueError, KeyError, OSError: if it cannot be read or decoded.
        """
        window = read_window(shard, members, self.store, self.frames)
        video = self._isolated_call(_decode, (read_clip(shard, members, self.store), window, self.height, self.width))
        # In numpy: torch would use all cores for a small array, and several loaders then fight over them.
        pixels = np.ascontiguousarray(video.transpose(3, 0, 1, 2), dtype=np.float32) / np.float32(127.5) - np.float32(1)
        caption = read_member(shard, members["txt"], self.store).decode()
        return {"video": torch.from_numpy(pixels), "uid": uid, "key": key, "caption": caption}

    def mark(self, sample: dict[str, Any], faults: int, counts: bool) -> None:
        sample["faults"] = faults
