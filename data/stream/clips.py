"""Clips out of video shards, decoded in the loader's processes.

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
        video: (T, H, W, 3) uint8; of a `VideoReader`, (3, T, H, W) float32 in [-1, 1].
        caption: of the clip.
        key: name of the sample inside its shard.
        visit: what is drawn for it is keyed by this.
        faults: damaged samples that were skipped before this one took their place.
        counts: whether it counts in an evaluation.
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
    """The first `frames` frame indices of a clip's window; all of them without.

    Args:
        facts: what the clip's json says of it.
        frames: how many; None takes all.

    Raises:
        ValueError: if the facts hold no such window.
    """
    indices = facts.get("indices")
    least = frames or 1
    if not isinstance(indices, list) or len(indices) < least or not all(type(i) is int and i >= 0 for i in indices):
        held = f"of {len(indices)}" if isinstance(indices, list) else "without"
        raise ValueError(f"its json holds a window {held} frame indices, expected {least} or more")
    return indices[:frames]


def _decode(task: tuple[bytes, list[int], int, int]) -> NDArray[np.uint8]:
    """(T, H, W, 3) of (clip, indices, H, W), in a process that can be killed."""
    content, indices, height, width = task
    return np.ascontiguousarray(decode_video(content, indices, height, width))


class ClipReader(ShardReader[ClipSample]):
    """Clips as `reblock encode` reads them: the window that packing chose, in the size of their bucket.

    Args:
        locations: of video shards, or shards that were found.
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

    def decode(self, key: str, files: Mapping[str, bytes], visit: Visit, bucket: Bucket | None = None) -> ClipSample:
        bucket = bucket or Bucket.parse(str(parse_facts(files["json"]).get("bucket")))
        video = self._decode(files, bucket.frames, bucket.height, bucket.width)
        return ClipSample(torch.from_numpy(video), files["txt"].decode(), key, visit)

    def _decode(self, files: Mapping[str, bytes], frames: int, height: int, width: int) -> NDArray[np.uint8]:
        """The first frames of a clip's window, (T, H, W, 3)."""
        window = clip_window(parse_facts(files["json"]), frames)
        return self._isolated_call(_decode, (files[clip_extension(files)], window, height, width))


class VideoReader(ClipReader):
    """Clips for training a VAE: all buckets are brought to one size, and pixels to [-1, 1].

    Args:
        locations: of video shards, or shards that were found.
        frames: T, the first frames of each clip's window.
        height: H; clips of another size are scaled and cropped about the centre.
        width: W; clips of another size are scaled and cropped about the centre.
        store: that reads them.
        max_fault_share: share of clips that may be damaged.
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
        # In numpy: torch would use all cores for a small array, and several loaders then compete for them.
        pixels = np.ascontiguousarray(video.transpose(3, 0, 1, 2), dtype=np.float32) / np.float32(127.5) - np.float32(1)
        return ClipSample(torch.from_numpy(pixels), files["txt"].decode(), key, visit)
