"""Figures: what a reader must find in them, at the demo's and the real model's sizes."""

import numpy as np
import pytest

from trainer.callbacks import figures
from trainer.callbacks.measurement_files import save_figure


def sink_arrays(layers, heads, sinks=()):
    prompts, sigmas, eps = 3, 2, (0.01, 0.3)
    fraction = np.zeros((prompts, sigmas, len(layers), heads, len(eps)))
    for layer, head in sinks:
        fraction[:, :, list(layers).index(layer), head] = 1.0
    return {
        "layers": np.array(layers),
        "eps": np.array(eps),
        "default_eps": np.array(0.3),
        "fraction": fraction,
        "frequency": (fraction > 0.5).mean(axis=0),
        "alpha": fraction[..., 1] * 0.8,
        "key": np.full(fraction.shape, 37),
        "grid": np.array([2, 4, 6]),
        "queries": np.array(50),
        "keys_count": np.array(50),
    }


def masking_arrays(scopes, **changes):
    ratios = np.array([0.1, 0.5, 0.9])
    rows = np.outer(np.arange(1, len(scopes) + 1), ratios)
    return {
        "ratios": ratios,
        "sigmas": np.array([0.5]),
        "scopes": np.array(scopes),
        "distortion": rows,
        "loss_increase": rows / 10,
        "dense_loss": np.array(0.5),
        "critical_ratio": np.array([0.9, *[0.25] * (len(scopes) - 1)]),
        "uniform_distortion": rows[:, -1],
        "uniform_loss_increase": rows[:, -1],
        "prompts": np.array(3),
    } | changes


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_heat_map_names_layers_and_heads_and_writes_values(tmp_path):
    figure = figures.sinks(sink_arrays([4, 5], 3, sinks=[(5, 1)]), "base", planted={(5, 1), (9, 0)})
    frequency, fraction, alpha = [axes for axes in figure.axes if axes.images and axes.get_title(loc="left")]
    assert [label.get_text() for label in frequency.get_yticklabels()] == ["layer 4", "layer 5"]
    assert [label.get_text() for label in frequency.get_xticklabels()] == ["head 0", "head 1", "head 2"]
    assert texts(frequency) == texts(fraction) == ["0.00"] * 4 + ["1.00", "0.00"]
    assert texts(alpha)[4] == "0.80"
    (box,) = frequency.patches  # the planted head among the measured layers, row 1, column 1
    assert (round(box.get_x()), round(box.get_y())) == (1, 1)
    assert "base" in figure.get_suptitle() and "planted" in figure.get_suptitle()
    save_figure(tmp_path / "a.png", figure)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_is_outlined_where_nothing_was_planted():
    figure = figures.sinks(sink_arrays([4], 2), "epoch-001")
    assert not any(axes.patches for axes in figure.axes[:3]) and "planted" not in figure.get_suptitle()


@pytest.mark.parametrize("layers, heads", [(range(44, 48), 24), (range(48), 24), (range(7, 8), 1)])
def test_heat_maps_of_other_sizes_are_drawn(tmp_path, layers, heads):
    save_figure(tmp_path / "a.png", figures.sinks(sink_arrays(layers, heads), "base"))
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_positions_count_sinks_by_frame_and_place():
    assert figures.sink_positions(sink_arrays([4], 2), "base") is None
    figure = figures.sink_positions(sink_arrays([4], 2, sinks=[(4, 0)]), "base")
    left, right = figure.axes[:2]
    assert [bar.get_height() for bar in left.patches] == [0.0, 1.0]  # key 37 of 2 x 4 x 6: frame 1, y 2, x 1
    image = right.images[0].get_array()
    assert image[2, 1] == 1.0 and image.sum() == 1.0
    assert "6 sinks" in figure.get_suptitle() and "p =" not in figure.get_suptitle()
    tested = sink_arrays([4], 2, sinks=[(4, 0)]) | {"frame_p": np.array(0.0005), "place_p": np.array(0.31)}
    title = figures.sink_positions(tested, "base").get_suptitle()
    assert "evenly spread: p = 0.0005 over frames, 0.31 over places" in title


def test_masking_curves_start_at_the_origin_and_name_their_scopes():
    figure = figures.masking(masking_arrays(["retrained", "layer-04", "but-04-05"]), "base")
    _, right = figure.axes[:2]
    curves = [line for line in right.lines if len(line.get_xdata()) == 4]
    np.testing.assert_allclose(curves[1].get_xydata(), [[0, 0], [0.1, 0.04], [0.5, 0.2], [0.9, 0.36]])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["retrained layers: r* ≥ 0.90", "layer 4: r* = 0.25", "all but 04, 05: r* = 0.25"]


def test_a_critical_ratio_is_not_named_where_attention_costs_nothing():
    arrays = masking_arrays(["retrained", "all"], uniform_loss_increase=np.array([0.004, 0.006]))  # 1 %: 0.005
    legend = figures.masking(arrays, "epoch-000").legends[0]
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["retrained layers: r* not measured", "all layers: r* = 0.25"]
    assert "the uniform control costs nothing" in legend.get_title().get_text()


def test_masking_figure_survives_what_is_no_number_and_zero_distortion(tmp_path):
    broken = masking_arrays(["retrained", "all"])
    broken["loss_increase"] = np.array([[np.nan, np.inf, 0.1], [0.0, 0.0, -0.2]])
    broken["distortion"] = np.array([[np.nan, np.inf, 0.1], [0.0, 0.0, 0.0]])
    save_figure(tmp_path / "a.png", figures.masking(broken, "epoch-001"))
    assert (tmp_path / "a.png").stat().st_size > 1000
