"""The figures of the study of sinks: several heat maps side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

_MOST_TICKS = 16
#: A panel with more cells than this does not print the values in its cells.
_MOST_CELLS = 64


@dataclass(frozen=True)
class Panel:
    """One heat map, the first row on top.

    Args:
        values: (rows, columns).
        title: above it.
        x_label: of the columns.
        y_label: of the rows.
        x_ticks: name of each column.
        y_ticks: name of each row.
    """

    values: ArrayLike
    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[Any]
    y_ticks: Sequence[Any]


def panels(rows: Sequence[Sequence[Panel]], *, value_label: str, limits: tuple[float, float] | None = None) -> Figure:
    """Heat maps in rows, with one scale of colours.

    Args:
        rows: of equally many panels.
        value_label: of the colours.
        limits: values at the ends of the scale; those of all panels by default.
    """
    tables = [[np.atleast_2d(np.asarray(panel.values, float)) for panel in row] for row in rows]
    if limits is None:
        finite = np.concatenate([table[np.isfinite(table)] for row in tables for table in row])
        limits = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    heights = [max(1.4, 0.24 * min(24, max(len(table) for table in row))) for row in tables]
    figure = Figure(figsize=(7.2, 0.6 + sum(heights) + 0.7 * len(rows)), layout="constrained")
    grid: Any = figure.subplots(len(rows), len(rows[0]), squeeze=False, height_ratios=heights)
    for axes_row, panel_row, table_row in zip(grid, rows, tables, strict=True):
        for axes, panel, table in zip(axes_row, panel_row, table_row, strict=True):
            image = axes.imshow(table, aspect="auto", cmap="viridis", vmin=limits[0], vmax=limits[1])
            axes.set_title(panel.title, fontsize=9)
            axes.set_xlabel(panel.x_label, fontsize=8)
            axes.set_ylabel(panel.y_label, fontsize=8)
            _ticks(axes.xaxis, panel.x_ticks)
            _ticks(axes.yaxis, panel.y_ticks)
            axes.tick_params(labelsize=7)
            if table.size <= _MOST_CELLS:
                _write(axes, table, sum(limits) / 2)
    figure.colorbar(image, ax=grid, label=value_label)
    return figure


def _ticks(axis: Any, names: Sequence[Any]) -> None:
    every = max(1, -(-len(names) // _MOST_TICKS))
    axis.set_ticks(range(0, len(names), every), [str(name) for name in names[::every]])


def _write(axes: Any, table: np.ndarray, middle: float) -> None:
    for (row, column), value in np.ndenumerate(table):
        colour = "black" if value > middle else "white"
        axes.text(column, row, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
