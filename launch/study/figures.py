"""The figures of studies: curves with intervals, and heat maps. matplotlib draws them, as PNG and SVG."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike, tuple[ArrayLike, ArrayLike] | None]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    title: str = "",
) -> Figure:
    """Lines with their intervals.

    Args:
        series: label -> x, y, and lower and upper ends of y or None.
        x_label: of the horizontal axis.
        y_label: of the vertical axis.
        log: whether the vertical axis is logarithmic.
        title: above the axes.
    """
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes: Any = figure.subplots()
    for label, (x, y, ends) in series.items():
        (line,) = axes.plot(np.asarray(x), np.asarray(y), marker="o", markersize=3, label=label)
        if ends is not None:
            axes.fill_between(np.asarray(x), *map(np.asarray, ends), color=line.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel=x_label, ylabel=y_label, title=title, **({"yscale": "log"} if log else {}))
    axes.grid(alpha=0.3)
    if len(series) > 1:
        axes.legend(fontsize=8)
    return figure


def heat_map(
    values: ArrayLike,
    *,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[Any] | None = None,
    y_ticks: Sequence[Any] | None = None,
    value_label: str,
    title: str = "",
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A matrix as colours, the first row on top.

    Args:
        values: (rows, columns).
        x_label: of the columns.
        y_label: of the rows.
        x_ticks: name of each column; their numbers by default.
        y_ticks: name of each row; their numbers by default.
        value_label: of the colours.
        title: above the axes.
        limits: values of the ends of the colour scale.
    """
    matrix = np.atleast_2d(np.asarray(values, float))
    figure = Figure(figsize=(7.2, 1.6 + 0.22 * min(30, max(6, len(matrix)))), layout="constrained")
    axes: Any = figure.subplots()
    low, high = limits or (None, None)
    image = axes.imshow(matrix, aspect="auto", cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
    figure.colorbar(image, ax=axes, label=value_label)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    for names, count, axis in ((x_ticks, matrix.shape[1], axes.xaxis), (y_ticks, matrix.shape[0], axes.yaxis)):
        every = max(1, -(-count // 24))
        axis.set_ticks(range(0, count, every), [str((names or range(count))[i]) for i in range(0, count, every)])
    axes.tick_params(labelsize=8)
    return figure
