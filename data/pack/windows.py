"""Which frames of a clip are packed: scenes, windows and buckets.

Legend: N frames of a clip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.bucket import Bucket, choose_bucket

#: Which windows of a clip become samples: the first, the middle one, or all, one after another.
WINDOWS = ("first", "middle", "all")


@dataclass(frozen=True)
class WindowSettings:
    """How windows are taken from a clip.

    Args:
        buckets: to choose from.
        fps: of the frames of a window; None takes consecutive frames.
        window: one of `WINDOWS`.
        scene_threshold: score of a scene cut, 0 to 1; None does not look for scenes.
        upscale: use clips that have to be enlarged.

    Raises:
        ValueError: for an unknown window, or a rate or threshold out of range.
    """

    buckets: tuple[Bucket, ...]
    fps: float | None = None
    window: str = "first"
    scene_threshold: float | None = None
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"got window {self.window!r}, expected one of {', '.join(WINDOWS)}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"got fps {self.fps}, expected frames per second above 0, or none to take every frame.")
        if self.scene_threshold is not None and not 0 < self.scene_threshold < 1:
            raise ValueError(f"got scene_threshold {self.scene_threshold}, expected between 0 and 1, for example 0.3.")

    def windows(
        self, times: NDArray[np.float64], height: int, width: int, cuts: Sequence[float] = ()
    ) -> list[tuple[Bucket, list[int]]]:
        """Windows of a clip, (bucket, frame indices), in order; empty if the clip fits no bucket.

        Args:
            times: (N,) of the frames, in seconds from the first.
            height: of the clip, in pixels.
            width: of the clip, in pixels.
            cuts: seconds at which scenes begin; no window contains a cut.
        """
        edges = [0, *sorted({int(np.searchsorted(times, cut - 1e-6)) for cut in cuts}), len(times)]
        found = []
        for first, end in zip(edges[:-1], edges[1:], strict=True):
            if end > first:
                scene = times[first:end] - times[first]
                found += [(b, [first + i for i in indices]) for b, indices in self._scene_windows(scene, height, width)]
        return found

    def _scene_windows(self, times: NDArray[np.float64], height: int, width: int) -> list[tuple[Bucket, list[int]]]:
        lengths = sorted({bucket.frames for bucket in self.buckets}, reverse=True)
        longest = next((length for length in lengths if self._window(times, length) is not None), 0)
        bucket = choose_bucket(height, width, longest, self.buckets, upscale=self.upscale)
        if bucket is None:
            return []
        count = bucket.frames
        if self.window == "middle":
            spare = len(times) - count if self.fps is None else times[-1] - (count - 1) / self.fps
            half = max(0.0, spare / 2)
            # Start on a frame. Half a frame later, at the clip's own rate, every choice of the nearest frame would be a
            # tie, which rounding errors would decide.
            starts = [half if self.fps is None else float(times[np.searchsorted(times, half + 1e-9, side="right") - 1])]
        else:
            step = count if self.fps is None else count / self.fps
            end = len(times) if self.fps is None else times[-1] + 1 / self.fps
            starts = [k * step for k in range(int(end / step) + 1 if self.window == "all" else 1)]
        windows = [self._window(times, count, start) for start in starts]
        return [(bucket, indices) for indices in windows if indices is not None]

    def _window(self, times: NDArray[np.float64], count: int, start: float = 0.0) -> list[int] | None:
        """Indices from `start` on, which is in seconds, or in frames if `fps` is None."""
        if self.fps is not None:
            return window_indices(times, count, self.fps, start)
        first = int(start)
        return list(range(first, first + count)) if first + count <= len(times) else None


def window_indices(
    times: NDArray[np.float64], frames: int, fps: float | None = None, start: float = 0.0
) -> list[int] | None:
    """Indices of the frames nearest in time to start, start + 1 / fps, start + 2 / fps, ...

    If the clip has fewer frames per second than `fps`, some indices occur twice.

    Args:
        times: (N,) of the clip, seconds, ascending.
        frames: number of indices.
        fps: of the window; None takes every frame from the one nearest to `start`.
        start: seconds from the first frame.

    Returns:
        `frames` indices, ascending; None if the clip is too short.

    Raises:
        ValueError: if frames < 1, fps <= 0 or start < 0.
    """
    if frames < 1 or fps is not None and not fps > 0 or not start >= 0:
        raise ValueError(f"got frames {frames}, fps {fps}, start {start}; expected frames >= 1, fps > 0, start >= 0.")
    wanted = start + (np.arange(frames) / fps if fps else np.zeros(1))
    step = float(np.median(np.diff(times))) if len(times) > 1 else 0.0
    if wanted[-1] > times[-1] + step / 2 + 1e-9:
        return None
    after = np.searchsorted(times, wanted).clip(1, max(len(times) - 1, 1))
    # Of two frames equally near, the earlier: 1e-9 s, so that no rounding error decides.
    nearest = [int(i) if i < len(times) and times[i] - w < w - times[i - 1] - 1e-9 else int(i) - 1
               for i, w in zip(after, wanted, strict=True)]  # fmt: skip
    if fps is not None:
        return nearest
    return list(range(nearest[0], nearest[0] + frames)) if nearest[0] + frames <= len(times) else None
