"""Panels of attention maps, with the borders of frames and of the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from launch.study.maps import MapSizes

#: Range of the colours, in powers of ten around uniform attention.
_LOW, _HIGH = -2.0, 2.0


@dataclass(frozen=True)
class MapLines:
    """Where frames and text begin in a map.

    Args:
        frames: borders between latent frames, as shares of the map's side.
        text: the border of vision and text; None without text.
    """

    frames: Sequence[float]
    text: float | None

    @classmethod
    def of(cls, sizes: MapSizes, text_tokens: int) -> "MapLines":
        """The borders of a map of vision tokens and so many text tokens."""
        vision = sizes.frames * sizes.tokens_per_frame
        share = vision / (vision + text_tokens)
        inner = [share * frame / sizes.frames for frame in range(1, sizes.frames)]
        return cls(inner, share if text_tokens else None)


def map_panels(
    panels: Sequence[Sequence[NDArray]], rows: Sequence[str], columns: Sequence[str], lines: MapLines
) -> Figure:
    """A grid of maps (S, S), multiples of uniform attention, in one logarithmic colour scale.

    Args:
        panels: by row and column; the first query is on top, the first key at the left.
        rows: name of each row.
        columns: name of each column.
        lines: borders that are drawn on every map.
    """
    figure = Figure(figsize=(1.6 + 1.5 * len(columns), 0.5 + 1.5 * len(rows)), layout="compressed")
    grid: Any = figure.subplots(len(rows), len(columns), squeeze=False)
    image = None
    for i, row in enumerate(panels):
        for j, values in enumerate(row):
            axes, side = grid[i, j], len(values)
            image = axes.imshow(
                np.log10(np.maximum(values, 1e-12)), cmap="viridis", vmin=_LOW, vmax=_HIGH, interpolation="nearest"
            )
            for share in lines.frames:
                _cross(axes, share * side - 0.5, "white", 0.4)
            if lines.text is not None:
                _cross(axes, lines.text * side - 0.5, "red", 1.0)
            axes.set(xticks=[], yticks=[])
            if i == 0:
                axes.set_title(columns[j], fontsize=8)
            if j == 0:
                axes.set_ylabel(rows[i], fontsize=8)
    assert image is not None  # there is a panel
    figure.colorbar(image, ax=grid, label="log10 (weight / uniform)", extend="both", shrink=0.8)
    return figure


def _cross(axes: Any, place: float, colour: str, width: float) -> None:
    axes.axhline(place, color=colour, linewidth=width)
    axes.axvline(place, color=colour, linewidth=width)
