"""Clips of shards, decoded in processes that may hang or crash: what `data.video.worker_pool` is given to do.

Legend: T video frames, H W pixels.
"""

import numpy as np
from numpy.typing import NDArray

from data.bucket import Bucket
from data.shards.archive import Members
from data.shards.format import read_clip, read_member
from data.storage.store import Store
from data.stream.clips import read_window
from data.video.decode import decode_video


def check_clip(task: tuple[str, Bucket, Members, Store]) -> None:
    """Decodes the window of a sample: (shard, bucket, members, store).

    Raises:
        ValueError: if a member is missing or wrong, or the clip cannot be decoded.
        OSError: if the shard cannot be read.
    """
    shard, bucket, members, store = task
    window = read_window(shard, members, store, bucket.frames)
    _caption(shard, members, store)
    decode_video(read_clip(shard, members, store), window)


def some_frames(task: tuple[str, Members, Store], count: int) -> tuple[str, NDArray[np.uint8]]:
    """Caption and `count` frames (T, H, W, 3), evenly spaced, of a sample's window: (shard, members, store).

    Raises:
        ValueError, OSError: as `check_clip`.
    """
    shard, members, store = task
    window = read_window(shard, members, store)
    picked = [window[i] for i in evenly(len(window), count)]
    return _caption(shard, members, store), decode_video(read_clip(shard, members, store), picked)


def evenly(length: int, count: int) -> list[int]:
    """`count` places in a list of `length`, from its first to its last; all of a shorter one."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _caption(shard: str, members: Members, store: Store) -> str:
    if "txt" not in members:
        raise ValueError("it has no caption (a member .txt)")
    return read_member(shard, members["txt"], store).decode()
