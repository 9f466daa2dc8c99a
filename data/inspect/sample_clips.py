"""Functions that decode clips of shards in the processes of a `WorkerPool`.

Legend: T video frames, H W pixels.
"""

import numpy as np
from numpy.typing import NDArray

from data.bucket import Bucket
from data.shards.archive import Members
from data.shards.format import read_clip, read_json, read_member
from data.storage.store import Store
from data.stream.clips import clip_window
from data.video.decode import decode_video


def check_clip(task: tuple[str, Bucket, Members, Store]) -> None:
    """Decodes the window of a sample.

    Args:
        task: (shard, bucket, members, store).

    Raises:
        ValueError: if a member is missing or wrong, or the clip cannot be decoded.
        OSError: if the shard cannot be read.
    """
    shard, bucket, members, store = task
    window = clip_window(read_json(shard, members, store), bucket.frames)
    _caption(shard, members, store)
    decode_video(read_clip(shard, members, store), window)


def decode_some_frames(task: tuple[str, Members, Store], count: int) -> tuple[str, NDArray[np.uint8]]:
    """Caption and `count` evenly spaced frames (T, H, W, 3) of a sample's window.

    Args:
        task: (shard, members, store).
        count: number of frames.

    Raises:
        ValueError: if a member is missing or wrong, or the clip cannot be decoded.
        OSError: if the shard cannot be read.
    """
    shard, members, store = task
    window = clip_window(read_json(shard, members, store))
    indices = [window[i] for i in even_indices(len(window), count)]
    return _caption(shard, members, store), decode_video(read_clip(shard, members, store), indices)


def even_indices(length: int, count: int) -> list[int]:
    """`count` evenly spaced indices of a list, from its first to its last item; all indices of a shorter list."""
    return np.linspace(0, length - 1, min(count, length)).round().astype(int).tolist()


def _caption(shard: str, members: Members, store: Store) -> str:
    if "txt" not in members:
        raise ValueError("it has no caption (a member .txt)")
    return read_member(shard, members["txt"], store).decode()
