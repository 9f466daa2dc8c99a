"""Draws line charts and heat maps as inline SVG.

Their colours are CSS variables of the page, so they follow its light and dark scheme; matplotlib's SVG cannot.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import ArrayLike, NDArray

Scale = Literal["linear", "log", "percent"]

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44  # margins of a chart, SVG units


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: name in the legend; an empty one leaves the curve out of the legend.
        x: horizontal values.
        y: vertical values; the curve has a gap at each value that is not finite.
        colour: n of the page's CSS variable --cn, from 1 to 4.
        style: a line, a faint line, a dashed line, or dots joined by a line.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    colour: int
    style: Literal["line", "faint", "dashed", "dots"] = "line"


def number(value: float, digits: int = 3) -> str:
    """A number as text: `digits` significant digits, a true minus, n/a if it is not finite."""
    if not math.isfinite(value):
        return "n/a"
    return f"{value:.{digits}g}".replace("-", "−") if value else "0"


def _percent(y: NDArray) -> NDArray:
    """A symmetric scale that is linear within 1 % and logarithmic beyond; 1 % and 10,000 % are both readable on it."""
    return np.arcsinh(np.asarray(y, float) / 0.01)


def _log(y: NDArray) -> NDArray:
    y = np.asarray(y, float)
    return np.log10(np.where(y > 0, y, np.nan))


_SCALES: dict[str, Callable[[NDArray], NDArray]] = {
    "linear": lambda y: np.asarray(y, float),
    "log": _log,
    "percent": _percent,
}


def _round_values(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers from low to high."""
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= raw * 0.999)
    return [round(k * step, 12) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _ticks(scale: Scale, low: float, high: float) -> list[tuple[float, str]]:
    """Position, in scaled units, and text of each tick."""
    if scale == "log":
        every = max(1, math.ceil((high - low) / 6))
        return [(float(k), f"1e{k}".replace("-", "−")) for k in range(math.ceil(low), math.floor(high) + 1, every)]
    if scale == "percent":
        values = [-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0, 10.0, 100.0]
        scaled = [(float(_percent(np.array(v))), f"{v * 100:+g} %".replace("-", "−") if v else "0") for v in values]
        return [tick for tick in scaled if low <= tick[0] <= high]
    return [(value, number(value, 4)) for value in _round_values(low, high)]


def _span(values: Sequence[NDArray], pad: float) -> tuple[float, float]:
    finite = np.concatenate([v[np.isfinite(v)] for v in values]) if values else np.array([])
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    margin = (high - low) * pad or abs(high) * 0.1 or 1.0
    return (low - margin, high + margin) if pad or low == high else (low, high)


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    scale: Scale = "linear",
    rule: tuple[float, str] | None = None,
    width: int = 560,
    height: int = 300,
) -> str:
    """Draws an SVG chart with axes, ticks and a legend below.

    Args:
        series: curves to draw; a curve without a finite point is left out.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        scale: scale of the vertical axis; `percent` takes shares and is linear within 1 %, logarithmic beyond.
        rule: value and text of a horizontal line.
        width: width of the chart in SVG units.
        height: height of the chart in SVG units.
    """
    to_y = _SCALES[scale]
    curves = [(s, np.asarray(s.x, float), to_y(np.asarray(s.y, float))) for s in series]
    curves = [(s, x, y) for s, x, y in curves if np.isfinite(y).any()]
    if not curves:
        return '<p class="missing">No finite value to draw.</p>'
    ruled = [to_y(np.array([rule[0]]))] if rule else []
    x0, x1 = _span([x for _, x, _ in curves], 0.0)
    y0, y1 = _span([*(y for _, _, y in curves), *ruled], 0.06)

    def px(x: NDArray | float) -> NDArray:
        return _LEFT + (np.asarray(x) - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)

    def py(y: NDArray | float) -> NDArray:
        return _TOP + (y1 - np.asarray(y)) / (y1 - y0) * (height - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{escape(y_label)}">']
    for value, text in _ticks(scale, y0, y1):
        at = float(py(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
    for value, text in _ticks("linear", x0, x1):
        parts.append(f'<text x="{float(px(value)):.1f}" y="{height - _BOTTOM + 18}" text-anchor="middle">{text}</text>')
    middle = (_TOP + height - _BOTTOM) / 2
    parts.append(
        f'<text class="name" x="{(_LEFT + width - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle">'
        f'{escape(x_label)}</text><text class="name" transform="translate(14 {middle}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    if rule:
        at = float(py(ruled[0][0]))
        parts.append(f'<line class="rule" x1="{_LEFT}" x2="{width - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text class="name" x="{_LEFT + 6}" y="{at - 5:.1f}">{escape(rule[1])}</text>')
    for s, x, y in curves:
        parts += _curve(s, px(x), py(y))
    return "".join(parts) + "</svg>" + _legend([s for s, _, _ in curves])


def _curve(series: Series, x: NDArray, y: NDArray) -> list[str]:
    attributes = f'class="curve {series.style}" style="stroke:var(--c{series.colour})"'
    breaks = np.flatnonzero(~np.isfinite(y))
    runs = zip(np.split(x, breaks), np.split(y, breaks), strict=True)
    drawn = []
    for xs, ys in runs:
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True) if math.isfinite(b)]
        if len(points) > 1:
            drawn.append(f'<polyline {attributes} points="{" ".join(points)}"/>')
        if points and (series.style == "dots" or len(points) == 1):
            drawn += [
                f'<circle cx="{p.split(",")[0]}" cy="{p.split(",")[1]}" r="3.2" style="fill:var(--c{series.colour})"/>'
                for p in points
            ]
    return drawn


def _legend(series: Sequence[Series]) -> str:
    keys = [
        f'<span><i class="{s.style}" style="border-color:var(--c{s.colour})"></i>{escape(s.label)}</span>'
        for s in series
        if s.label
    ]
    return f'<p class="legend">{"".join(keys)}</p>'


def heat_map(values: NDArray, rows: Sequence[str], *, marked: Collection[tuple[int, int]] = ()) -> str:
    """Draws an SVG heat map of shares from 0 to 1, with one row per layer and one column per head.

    Args:
        values: shares, (rows, heads); a NaN is drawn as an empty cell with a dash.
        rows: names of the rows.
        marked: (row, column) of the cells to outline.
    """
    heads = values.shape[1]
    cell = max(16, min(58, 620 // heads))
    high = min(cell, 34)
    left, top = 74, 22
    width, height = left + heads * cell + 8, top + len(rows) * high + 26
    parts = [f'<svg viewBox="0 0 {width} {height}" class="heat" style="max-width:{width}px" role="img">']
    for column in range(heads):
        parts.append(f'<text x="{left + (column + 0.5) * cell}" y="{top - 7}" text-anchor="middle">{column}</text>')
    for row, name in enumerate(rows):
        y = top + row * high
        parts.append(f'<text x="{left - 8}" y="{y + high / 2 + 4}" text-anchor="end">{escape(name)}</text>')
        for column in range(heads):
            x, value = left + column * cell, float(values[row, column])
            known = math.isfinite(value)
            fill = to_hex(colormaps["cividis"](min(max(value, 0.0), 1.0))) if known else "none"
            ring = ' class="ring"' if (row, column) in marked else ' class="cell"'
            parts.append(
                f'<rect x="{x + 1.5}" y="{y + 1.5}" width="{cell - 3}" height="{high - 3}" rx="3" fill="{fill}"{ring}>'
                f"<title>{escape(name)}, head {column}: {number(value)}</title></rect>"
            )
            if cell >= 30 or not known:
                ink = "#111" if known and value > 0.55 else "#fff" if known else "currentColor"
                text = f"{value:.2f}" if known else "–"
                middle = f'x="{x + cell / 2}" y="{y + high / 2 + 4}" text-anchor="middle"'
                parts.append(f'<text {middle} style="fill:{ink}">{text}</text>')
    parts.append(f'<text class="name" x="{left + heads * cell / 2}" y="{height - 6}" text-anchor="middle">head</text>')
    return "".join(parts) + "</svg>"
