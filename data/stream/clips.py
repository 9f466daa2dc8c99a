"""Reads clips from video shards and decodes them in the loader's processes.

Legend: B batch, T video frames, H W pixels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.bucket import Bucket
from data.shards.format import VIDEO_FORMAT, clip_extension, parse_facts
from data.storage.store import Store
from data.stream.reader import ShardReader, Visit
from data.video.decode import decode_video
from data.video.isolated_call import IsolatedCall


@dataclass
class ClipSample:
    """A decoded clip with its caption.

    Args:
        video: (T, H, W, 3) uint8; (3, T, H, W) float32 in [-1, 1] from a `VideoReader`.
        caption: caption text of the clip.
        key: name of the sample inside its shard.
        visit: visit that the clip is read for; it seeds the random numbers of this sample.
        faults: number of damaged samples that this one replaces.
        counts: whether the sample counts in an evaluation.
    """

    video: Tensor
    caption: str
    key: str
    visit: Visit
    faults: int = 0
    counts: bool = True


@dataclass
class ClipBatch:
    """Clips of one size; `videos` (B, T, H, W, 3) uint8."""

    videos: Tensor
    clips: tuple[ClipSample, ...]

    @classmethod
    def collate(cls, clips: Sequence[ClipSample]) -> "ClipBatch":
        """Stacks clips of one bucket."""
        videos = torch.stack([clip.video for clip in clips])
        return cls(videos, tuple(replace(clip, video=videos[0, :0]) for clip in clips))

    def to(self, device: torch.device | str, non_blocking: bool = True) -> "ClipBatch":
        """The same batch with its videos on `device`."""
        return replace(self, videos=self.videos.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ClipBatch":
        """The same batch in page-locked memory; the loader calls this."""
        return replace(self, videos=self.videos.pin_memory())


def clip_window(facts: Mapping[str, Any], frames: int | None = None) -> list[int]:
    """The first frame indices of a clip's window.

    Args:
        facts: content of the clip's json file.
        frames: number of indices; None takes all.

    Raises:
        ValueError: if the window is missing, malformed or shorter than `frames`.
    """
    indices = facts.get("indices")
    least = frames or 1
    if not isinstance(indices, list) or len(indices) < least or not all(type(i) is int and i >= 0 for i in indices):
        held = f"of {len(indices)}" if isinstance(indices, list) else "without"
        raise ValueError(f"its json holds a window {held} frame indices, expected {least} or more")
    return indices[:frames]


def _decode(task: tuple[bytes, list[int], int, int]) -> NDArray[np.uint8]:
    """Decodes (clip, indices, H, W) into (T, H, W, 3) uint8, in a process that can be killed."""
    content, indices, height, width = task
    return np.ascontiguousarray(decode_video(content, indices, height, width))


class ClipReader(ShardReader[ClipSample]):
    """Reads clips as `reblock encode` needs them: the window that packing chose, in the size of their bucket.

    Args:
        locations: locations of video shards, or `IndexedShards`.
        store: store that reads the shards.
        max_fault_share: share of clips that may be damaged, 0 to 1.
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

    def decode(self, key: str, files: Mapping[str, bytes], visit: Visit, bucket: Bucket | None = None) -> ClipSample:
        bucket = bucket or Bucket.parse(str(parse_facts(files["json"]).get("bucket")), self.buckets[0].family)
        video = self._decode(files, bucket.frames, bucket.height, bucket.width)
        return ClipSample(torch.from_numpy(video), files["txt"].decode(), key, visit)

    def _decode(self, files: Mapping[str, bytes], frames: int, height: int, width: int) -> NDArray[np.uint8]:
        """The first frames of a clip's window, (T, H, W, 3)."""
        window = clip_window(parse_facts(files["json"]), frames)
        return self._isolated_call(_decode, (files[clip_extension(files)], window, height, width))


class VideoReader(ClipReader):
    """Reads clips for training a VAE, all scaled to one size, with pixels in [-1, 1].

    Args:
        locations: locations of video shards, or `IndexedShards`.
        frames: T; the first T frames of each clip's window are read.
        height: H in pixels; clips of another size are scaled and cropped about the centre.
        width: W in pixels; clips of another size are scaled and cropped about the centre.
        store: store that reads the shards.
        max_fault_share: share of clips that may be damaged, 0 to 1.
        deadline: seconds that decoding a clip may take.

    Raises:
        ValueError: if a bucket has fewer frames.
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
        super().__init__(locations, store=store, max_fault_share=max_fault_share, deadline=deadline)
        self.frames, self.height, self.width = frames, height, width
        short = sorted({b.name for b in self.buckets if b.frames < frames})
        if short:
            raise ValueError(f"got frames {frames}, the shards' buckets {short} have fewer; lower data.frames.")

    def decode(self, key: str, files: Mapping[str, bytes], visit: Visit, bucket: Bucket | None = None) -> ClipSample:
        video = self._decode(files, self.frames, self.height, self.width)
        # numpy, since torch would use all cores even for a small array, and loader processes would compete for them.
        pixels = np.ascontiguousarray(video.transpose(3, 0, 1, 2), dtype=np.float32) / np.float32(127.5) - np.float32(1)
        return ClipSample(torch.from_numpy(pixels), files["txt"].decode(), key, visit)
