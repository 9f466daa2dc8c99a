"""The data module for training a VAE.

Legend: B batch, T video frames, H W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch

from data.modules.shard_module import ShardDataModule
from data.shards.format import VIDEO_FORMAT
from data.stream.clips import ClipSample, VideoReader
from data.stream.shard_index import IndexedShards


class VideoDataModule(ShardDataModule):
    """Clips for training a VAE: {"video": (B, 3, T, H, W) float32 in [-1, 1], "uid": (B,), "key": list of names}.

    Args:
        val_batch_size: validation clips per rank and step.
        frames: T, the first frames of each clip's window.
        height: H; clips of another size are scaled and cropped about the centre.
        width: W; clips of another size are scaled and cropped about the centre.
        deadline: seconds that decoding a clip may take.
        stream: the other fields of `StreamConfig`; `shards` are video shards.

    Raises:
        ValueError: if a size is below 1.
    """

    format = VIDEO_FORMAT
    default_batch_size = 8

    def __init__(
        self,
        *,
        val_batch_size: int = 8,
        frames: int = 19,
        height: int = 64,
        width: int = 64,
        deadline: float = 60.0,
        **stream: Any,
    ) -> None:
        super().__init__(val_batch_size=val_batch_size, **stream)
        if min(frames, height, width) < 1:
            raise ValueError(
                f"got frames {frames}, height {height}, width {width}; expected at least 1 frame and 1 pixel each way."
            )
        self.frames, self.height, self.width = frames, height, width
        self.deadline = deadline

    def make_reader(self, shards: Sequence[IndexedShards]) -> VideoReader:
        return VideoReader(
            shards, frames=self.frames, height=self.height, width=self.width, store=self.store,
            max_fault_share=self.config.max_fault_share, deadline=self.deadline,
        )  # fmt: skip

    @staticmethod
    def collate(samples: Sequence[ClipSample]) -> dict[str, Any]:
        return {
            "video": torch.stack([clip.video for clip in samples]),
            "uid": torch.tensor([clip.visit.uid for clip in samples]),
            "key": [clip.key for clip in samples],
            "faults": sum(clip.faults for clip in samples),
        }
