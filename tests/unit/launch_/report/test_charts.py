"""Charts are to scale, have gaps where there is no number, and name their cells."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from launch.report.charts import Panel, Series, heat_map, line_chart, number, panel_chart


def _points(svg: str) -> list[tuple[float, float]]:
    found = re.findall(r'points="([^"]*)"', svg)
    return [tuple(map(float, pair.split(","))) for line in found for pair in line.split()]


def test_a_chart_is_to_scale():
    svg = line_chart([Series("a", [0, 1, 2], [0.0, 5.0, 10.0], 1)], x_label="x", y_label="y")
    (x0, y0), (x1, y1), (x2, y2) = _points(svg)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.11)
    assert y0 > y2
    grid = {text: float(at) for at, text in re.findall(r'y="([\d.]+)" text-anchor="end">([^<]*)<', svg)}
    assert grid["0"] - 4 == pytest.approx(y0, abs=0.11)
    assert grid["10"] - 4 == pytest.approx(y2, abs=0.11)


def test_a_curve_is_broken_where_there_is_no_number():
    svg = line_chart([Series("a", range(5), [1, 2, np.nan, 4, 5], 1)], x_label="x", y_label="y")
    assert svg.count("<polyline") == 2
    assert "nan" not in svg


def test_a_logarithmic_chart_leaves_out_zero():
    svg = line_chart([Series("a", range(4), [0.0, 0.1, 1.0, 10.0], 1)], x_label="x", y_label="y", scale="log")
    heights = [y for _, y in _points(svg)]
    assert len(heights) == 3
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_a_logarithmic_horizontal_axis_leaves_out_zero_and_names_its_ticks():
    svg = line_chart([Series("a", [0.0, 0.02, 0.2], [1, 2, 3], 1)], x_label="x", y_label="y", x_scale="log")
    (x0, _), (x1, _) = _points(svg)
    ticks = {text: float(at) for at, text in re.findall(r'x="([\d.]+)" y="\d+" text-anchor="middle">([^<]*)<', svg)}
    assert ticks["0.02"] == pytest.approx(x0, abs=0.11) and ticks["0.2"] == pytest.approx(x1, abs=0.11)
    assert (ticks["0.1"] - ticks["0.05"]) == pytest.approx((x1 - x0) * np.log10(2), abs=0.2)


def test_panels_share_one_picture_and_its_horizontal_axis():
    x = [0, 1, 3]
    panels = [Panel([Series("a", x, [1, 2, 3], 1)], "up"), Panel([Series("b", x, [3, 2, 1], 2)], "down", height=80)]
    svg = panel_chart(panels, x_label="x", x_ticks=[(0, "base"), (1, "first"), (3, "third")])
    assert svg.count("<svg") == 1 and svg.count(">base<") == 1
    up, down = np.split(np.array(_points(svg)), 2)
    np.testing.assert_allclose(up[:, 0], down[:, 0])
    assert up[:, 1].max() < down[:, 1].min()  # below each other
    assert (np.diff(up[:, 1]) < 0).all() and (np.diff(down[:, 1]) > 0).all()


def test_intervals_are_bars_at_their_points():
    ends = ([0.0, np.nan], [10.0, 5.0])
    svg = line_chart([Series("a", [1, 2], [5.0, 4.0], 1, "dots", ends)], x_label="x", y_label="y")
    ((x, top, bottom),) = re.findall(r'class="bar"[^>]*x1="([\d.]+)"[^>]*y1="([\d.]+)" y2="([\d.]+)"', svg)
    (x0, y0), _ = _points(svg)
    assert float(x) == x0 and float(top) - y0 == pytest.approx(y0 - float(bottom), abs=0.11)
    assert svg.count('class="bar"') == 1


@pytest.mark.parametrize(
    "draw",
    [
        lambda: line_chart([Series("a", [1], [1.0], 1)], x_label="x", y_label="y"),
        lambda: line_chart([Series("a", [1, 2], [3.0, 3.0], 1)], x_label="x", y_label="y", scale="percent"),
        lambda: line_chart([Series("a", [1, 2], [0.0, 0.0], 1)], x_label="x", y_label="y", rule=(0.0, "r")),
        lambda: heat_map(np.full((1, 24), np.nan), ["layer 1"]),
    ],
)
def test_degenerate_charts_are_drawn(draw: Callable[[], str]):
    assert not re.search("nan|inf", draw())


def test_a_heat_map_names_its_cells_and_rings():
    svg = heat_map(np.array([[0.0, 0.25], [1.0, np.nan]]), ["layer 4", "layer 5"], marked={(1, 0)})
    assert "<title>layer 4, head 1: 0.25</title>" in svg
    assert svg.count('class="ring"') == 1
    assert re.search(r'class="ring"><title>layer 5, head 0: 1<', svg)
    assert "layer 5, head 1: n/a" in svg


def test_numbers_are_short_texts():
    assert [number(v) for v in (0.0, 0.12345, -2.0, float("nan"), float("inf"))] == ["0", "0.123", "−2", "n/a", "n/a"]
