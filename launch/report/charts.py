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
_GAP = 26  # between panels


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        label: name in the legend; an empty one leaves the curve out of the legend.
        x: horizontal values.
        y: vertical values; the curve has a gap at each value that is not finite.
        colour: n of the page's CSS variable --cn, from 1 to 4.
        style: a line, a faint line, a dashed line, dots joined by a line, or marks, dots that are not joined.
        ends: lower and upper ends of each vertical value's interval, drawn as a bar where both are finite.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    colour: int
    style: Literal["line", "faint", "dashed", "dots", "marks"] = "line"
    ends: tuple[ArrayLike, ArrayLike] | None = None


@dataclass(frozen=True)
class Panel:
    """A pair of axes.

    Args:
        series: the curves; those without a finite point are left out.
        y_label: name of the vertical axis.
        scale: of the vertical axis; `percent` takes shares and is linear within 1 %, logarithmic beyond.
        rule: a horizontal line at a value, with its text.
        height: in the picture's units, without the horizontal axis's labels.
    """

    series: Sequence[Series]
    y_label: str
    scale: Scale = "linear"
    rule: tuple[float, str] | None = None
    height: int = 242


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


def _ticks(scale: Scale, low: float, high: float, count: int = 6) -> list[tuple[float, str]]:
    """Position, in scaled units, and text of each of about `count` ticks."""
    if scale == "log" and high - low < 2:  # less than two decades hold few powers of ten, or none
        leading = (1, 2, 5) if high - low > 0.5 else range(1, 10)
        values = [m * 10.0**k for k in range(math.floor(low), math.ceil(high) + 1) for m in leading]
        return [(math.log10(v), number(v)) for v in values if low <= math.log10(v) <= high]
    if scale == "log":
        every = max(1, math.ceil((high - low) / count))
        return [(float(k), f"1e{k}".replace("-", "−")) for k in range(math.ceil(low), math.floor(high) + 1, every)]
    if scale == "percent":
        values = [-1.0, -0.1, -0.01, 0.0, 0.01, 0.1, 1.0, 10.0, 100.0]
        scaled = [(float(_percent(np.array(v))), f"{v * 100:+g} %".replace("-", "−") if v else "0") for v in values]
        return [tick for tick in scaled if low <= tick[0] <= high]
    return [(value, number(value, 4)) for value in _round_values(low, high, count)]


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
    x_scale: Literal["linear", "log"] = "linear",
    rule: tuple[float, str] | None = None,
    width: int = 560,
    height: int = 300,
) -> str:
    """An SVG chart of one panel, with a legend below.

    Args:
        series: as a `Panel` takes them, as are y_label, scale and rule.
        x_label: name of the horizontal axis.
        y_label: name of the vertical axis.
        scale: scale of the vertical axis.
        x_scale: scale of the horizontal axis.
        rule: value and text of a horizontal line.
        width: width of the chart in SVG units.
        height: height of the chart in SVG units.
    """
    panel = Panel(series, y_label, scale, rule, height - _TOP - _BOTTOM)
    return panel_chart([panel], x_label=x_label, x_scale=x_scale, width=width)


def panel_chart(
    panels: Sequence[Panel],
    *,
    x_label: str,
    x_scale: Literal["linear", "log"] = "linear",
    x_ticks: Sequence[tuple[float, str]] | None = None,
    width: int = 560,
) -> str:
    """One SVG of panels below each other on a common horizontal axis, with a legend of all curves below.

    Args:
        panels: from the top; those without a finite value are left out.
        x_label: name of the horizontal axis.
        x_scale: its scale.
        x_ticks: places and texts of its ticks; round numbers if None.
        width: width of the chart in SVG units.
    """
    drawn = [_Drawn(panel, x_scale) for panel in panels]
    drawn = [panel for panel in drawn if panel.curves]
    if not drawn:
        return '<p class="missing">No finite value to draw.</p>'
    places = [np.array([place for place, _ in x_ticks])] if x_ticks else []
    x0, x1 = _span([*(x for panel in drawn for _, x, _ in panel.curves), *places], 0.0)
    if x_ticks:  # points at the ends get room
        x0, x1 = x0 - 0.06 * (x1 - x0), x1 + 0.06 * (x1 - x0)

    def px(x: NDArray | float) -> NDArray:
        return _LEFT + (np.asarray(x) - x0) / (x1 - x0) * (width - _LEFT - _RIGHT)

    parts, top = [], _TOP
    for panel in drawn:
        parts += panel.parts(px, top, width)
        top += panel.panel.height + _GAP
    bottom, height = top - _GAP, top - _GAP + _BOTTOM
    for value, text in x_ticks or _ticks(x_scale, x0, x1):
        parts.append(f'<text x="{float(px(value)):.1f}" y="{bottom + 18}" text-anchor="middle">{escape(text)}</text>')
    parts.append(
        f'<text class="name" x="{(_LEFT + width - _RIGHT) / 2}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
    )
    name = escape("; ".join(panel.panel.y_label for panel in drawn))
    head = f'<svg viewBox="0 0 {width} {height}" class="chart" role="img" aria-label="{name}">'
    return head + "".join(parts) + "</svg>" + _legend([s for panel in drawn for s, _, _ in panel.curves])


class _Drawn:
    """A panel with its curves in scaled units."""

    def __init__(self, panel: Panel, x_scale: Scale) -> None:
        self.panel = panel
        self.to_y = _SCALES[panel.scale]
        curves = [
            (s, _SCALES[x_scale](np.asarray(s.x, float)), self.to_y(np.asarray(s.y, float))) for s in panel.series
        ]
        curves = [(s, np.where(np.isfinite(x), x, np.nan), np.where(np.isfinite(x), y, np.nan)) for s, x, y in curves]
        self.curves = [(s, x, y) for s, x, y in curves if np.isfinite(y).any()]

    def parts(self, px: Callable[[NDArray | float], NDArray], top: int, width: int) -> list[str]:
        """Grid, names, rule and curves, from `top` down.

        Args:
            px: scaled abscissae -> places.
            top: of the panel.
            width: of the picture.
        """
        panel, right = self.panel, width - _RIGHT
        ruled = [self.to_y(np.array([panel.rule[0]]))] if panel.rule else []
        bars = [self.to_y(np.asarray(end, float)) for s, _, _ in self.curves for end in s.ends or ()]
        y0, y1 = _span([*(y for _, _, y in self.curves), *ruled, *bars], 0.06)

        def py(y: NDArray | float) -> NDArray:
            return top + (y1 - np.asarray(y)) / (y1 - y0) * panel.height

        parts = []
        for value, text in _ticks(panel.scale, y0, y1, count=max(4, min(6, panel.height // 25))):
            at = float(py(value))
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text x="{_LEFT - 7}" y="{at + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(
            f'<text class="name" transform="translate(14 {top + panel.height / 2}) rotate(-90)" '
            f'text-anchor="middle">{escape(panel.y_label)}</text>'
        )
        if panel.rule:
            at = float(py(ruled[0][0]))
            parts.append(f'<line class="rule" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            parts.append(f'<text class="name" x="{_LEFT + 6}" y="{at - 5:.1f}">{escape(panel.rule[1])}</text>')
        for s, x, y in self.curves:
            if s.ends:
                parts += _bars(s, px(x), *(py(self.to_y(np.asarray(end, float))) for end in s.ends))
            parts += _curve(s, px(x), py(y))
        return parts


def _bars(series: Series, x: NDArray, low: NDArray, high: NDArray) -> list[str]:
    style = f'class="bar" style="stroke:var(--c{series.colour})"'
    return [
        f'<line {style} x1="{at:.1f}" x2="{at:.1f}" y1="{a:.1f}" y2="{b:.1f}"/>'
        for at, a, b in zip(x, low, high, strict=True)
        if math.isfinite(at + a + b)
    ]


def _curve(series: Series, x: NDArray, y: NDArray) -> list[str]:
    attributes = f'class="curve {series.style}" style="stroke:var(--c{series.colour})"'
    breaks = np.flatnonzero(~np.isfinite(y))
    runs = zip(np.split(x, breaks), np.split(y, breaks), strict=True)
    drawn = []
    for xs, ys in runs:
        points = [f"{a:.1f},{b:.1f}" for a, b in zip(xs, ys, strict=True) if math.isfinite(b)]
        if len(points) > 1 and series.style != "marks":
            drawn.append(f'<polyline {attributes} points="{" ".join(points)}"/>')
        if points and (series.style in ("dots", "marks") or len(points) == 1):
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
