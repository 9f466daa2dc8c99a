"""Filters: which clips and captions are packed."""

import math
from dataclasses import dataclass, fields

from data.video.probe import VideoInfo


@dataclass(frozen=True)
class Filters:
    """Bounds for clips; None sets no bound. A clip outside the bounds is filtered, which is not a fault.

    Args:
        min_seconds: shortest clip.
        max_seconds: longest clip.
        min_fps: fewest frames per second.
        max_fps: most frames per second.
        min_side: fewest pixels of the shorter side.
        max_aspect: largest ratio of the longer to the shorter side.
        min_caption: fewest characters of a caption; without it, an empty caption is accepted.
        max_caption: most characters of a caption.

    Raises:
        ValueError: for bounds that no clip can meet.
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
        for quantity in ("seconds", "fps", "caption"):
            low, high = values[f"min_{quantity}"], values[f"max_{quantity}"]
            if low is not None and high is not None and low > high:
                wrong.append(f"min_{quantity} {low} above max_{quantity} {high}")
        if self.max_aspect is not None and self.max_aspect < 1:
            wrong.append(f"max_aspect {self.max_aspect} below 1, a square")
        if wrong:
            raise ValueError(f"got filters {', '.join(wrong)}; expected bounds of 0 or more that some clip can meet.")

    def caption(self, text: str) -> tuple[str, str] | None:
        """(name of the filter, reason) if a caption is outside the bounds."""
        return self._outside("caption", len(text), "a caption of {} characters")

    def clip(self, info: VideoInfo) -> tuple[str, str] | None:
        """(name of the filter, reason) if a clip is outside the bounds."""
        short, long = sorted((info.height, info.width))
        for quantity, value, text in (("seconds", info.duration, "{:.3g} s"), ("fps", info.fps, "{:.4g} fps")):
            if outside := self._outside(quantity, value, text):
                return outside
        if self.min_side is not None and short < self.min_side:
            return "min_side", f"{info.height}x{info.width} pixels, min_side is {self.min_side}"
        if self.max_aspect is not None and long > self.max_aspect * short:
            return "max_aspect", f"{info.height}x{info.width} pixels, max_aspect is {self.max_aspect}"
        return None

    def _outside(self, quantity: str, value: float, text: str) -> tuple[str, str] | None:
        low, high = getattr(self, f"min_{quantity}"), getattr(self, f"max_{quantity}")
        if low is not None and value < low:
            return f"min_{quantity}", f"{text.format(value)}, min_{quantity} is {low}"
        if high is not None and value > high:
            return f"max_{quantity}", f"{text.format(value)}, max_{quantity} is {high}"
        return None
