"""Which clips are wanted, and which of their frames: filters, scenes, windows and buckets.

Legend: T frames of a window, N frames of a clip.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from data.bucket import Bucket, choose_bucket
from data.video.probe import VideoInfo

#: What a clip is used for: the first window, the middle one, or as many as it holds, one after another.
WINDOWS = ("first", "middle", "all")


@dataclass(frozen=True)
class Filters:
    """Which clips are wanted; None sets no bound. Clips outside are filtered, which is no fault.

    Args:
        min_seconds: shortest clip.
        max_seconds: longest clip.
        min_fps: fewest frames per second.
        max_fps: most frames per second.
        min_side: shortest side in pixels that the smaller side may have.
        max_aspect: largest ratio of the longer to the shorter side.
        min_caption: fewest characters of a caption; an empty caption is one, unless this says otherwise.
        max_caption: most characters of a caption.

    Raises:
        ValueError: for bounds that no clip meets.
    """

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_fps: float | None = None
    max_fps: float | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    min_caption: int | None = None
    max_caption: int | None = None

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [f"{name} {value}" for name, value in values.items() if value is not None and not 0 <= value < math.inf]
        for what in ("seconds", "fps", "caption"):
            low, high = values[f"min_{what}"], values[f"max_{what}"]
            if low is not None and high is not None and low > high:
                wrong.append(f"min_{what} {low} above max_{what} {high}")
        if self.max_aspect is not None and self.max_aspect < 1:
            wrong.append(f"max_aspect {self.max_aspect} below 1, a square")
        if wrong:
            raise ValueError(f"got filters {', '.join(wrong)}; expected bounds of 0 or more that some clip can meet.")

    def caption(self, text: str) -> tuple[str, str] | None:
        """(name of the filter, why) if a caption is not wanted."""
        return self._outside("caption", len(text), "a caption of {} characters")

    def clip(self, info: VideoInfo) -> tuple[str, str] | None:
        """(name of the filter, why) if a clip is not wanted."""
        short, long = sorted((info.height, info.width))
        if why := self._outside("seconds", info.duration, "{:.3g} s") or self._outside("fps", info.fps, "{:.4g} fps"):
            return why
        if self.min_side is not None and short < self.min_side:
            return "min_side", f"{info.height}x{info.width} pixels, min_side is {self.min_side}"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return "max_aspect", f"{info.height}x{info.width} pixels, max_aspect is {self.max_aspect}"
        return None

    def _outside(self, what: str, value: float, text: str) -> tuple[str, str] | None:
        low, high = getattr(self, f"min_{what}"), getattr(self, f"max_{what}")
        if low is not None and value < low:
            return f"min_{what}", f"{text.format(value)}, min_{what} is {low}"
        if high is not None and value > high:
            return f"max_{what}", f"{text.format(value)}, max_{what} is {high}"
        return None


@dataclass(frozen=True)
class Cutting:
    """How windows are taken from a clip.

    Args:
        buckets: to choose from.
        fps: of the frames that are used; None takes consecutive ones.
        window: one of `WINDOWS`.
        scene_threshold: of a cut, 0 to 1; None leaves scenes together.
        upscale: take clips that have to be enlarged.

    Raises:
        ValueError: for a window, rate or threshold that does not exist.
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
        """Windows of a clip with their buckets, in order; empty if it fits none.

        Args:
            times: (N,) of the frames, in seconds from the first.
            height: in pixels.
            width: likewise.
            cuts: seconds at which scenes begin; no window crosses one.
        """
        edges = [0, *sorted({int(np.searchsorted(times, cut - 1e-6)) for cut in cuts}), len(times)]
        found = []
        for first, end in zip(edges[:-1], edges[1:], strict=True):
            if end > first:
                scene = times[first:end] - times[first]
                found += [(b, [first + i for i in indices]) for b, indices in self._scene(scene, height, width)]
        return found

    def _scene(self, times: NDArray[np.float64], height: int, width: int) -> list[tuple[Bucket, list[int]]]:
        lengths = sorted({bucket.frames for bucket in self.buckets}, reverse=True)
        longest = next((length for length in lengths if self._window(times, length) is not None), 0)
        bucket = choose_bucket(height, width, longest, self.buckets, upscale=self.upscale)
        if bucket is None:
            return []
        count = bucket.frames
        if self.window == "middle":
            spare = len(times) - count if self.fps is None else times[-1] - (count - 1) / self.fps
            half = max(0.0, spare / 2)
            # On a frame: half a frame off, all of a clip's own rate would be ties, which rounded times break at random.
            starts = [half if self.fps is None else float(times[np.searchsorted(times, half + 1e-9, side="right") - 1])]
        else:
            step = count if self.fps is None else count / self.fps
            end = len(times) if self.fps is None else times[-1] + 1 / self.fps
            starts = [k * step for k in range(int(end / step) + 1 if self.window == "all" else 1)]
        windows = [self._window(times, count, start) for start in starts]
        return [(bucket, indices) for indices in windows if indices is not None]

    def _window(self, times: NDArray[np.float64], count: int, start: float = 0.0) -> list[int] | None:
        """Indices from `start` on, which counts frames where no rate is asked for, else seconds."""
        if self.fps is not None:
            return window_indices(times, count, self.fps, start)
        first = int(start)
        return list(range(first, first + count)) if first + count <= len(times) else None


def window_indices(
    times: NDArray[np.float64], frames: int, fps: float | None = None, start: float = 0.0
) -> list[int] | None:
    """Indices of the frames that are shown nearest to start, start + 1 / fps, start + 2 / fps, ...

    A clip of fewer frames per second than `fps` gives some of them twice.

    Args:
        times: (T,) of the clip, seconds, ascending.
        frames: how many indices.
        fps: of the window; None takes every frame from the one nearest to `start`.
        start: seconds from the first frame.

    Returns:
        `frames` indices, ascending; None if the clip ends before.

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
    # Of two frames equally near, the earlier; a rounding error must not decide.
    nearest = [int(i) if i < len(times) and times[i] - w < w - times[i - 1] - 1e-9 else int(i) - 1
               for i, w in zip(after, wanted, strict=True)]  # fmt: skip
    if fps is not None:
        return nearest
    return list(range(nearest[0], nearest[0] + frames)) if nearest[0] + frames <= len(times) else None
