"""Figures of the measurements, drawn without pyplot, which would change process-wide state.

Legend: P prompts, S sigmas, K scopes, R ratios, Ly layers, h heads, E eps values.
"""

from collections.abc import Mapping, Set

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from trainer.callbacks.masking_statistics import TOLERATED, UNMEASURED, bears_on_attention

#: Okabe and Ito's palette, which colour-blind readers can distinguish; black first.
PALETTE = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#CC79A7", "#0072B2", "#F0E442")
_MARKERS = "osD^vPX*"
#: Outline of planted heads: visible on every colour of the map.
_OUTLINE = "#D55E00"
#: A heat map with more cells than this does not print the values in its cells.
_MOST_CELLS = 400


def _at_default(arrays: Mapping[str, np.ndarray]) -> int:
    return int(np.flatnonzero(arrays["eps"] == arrays["default_eps"])[0])


def _heat_map(axes: Axes, values: np.ndarray, layers: np.ndarray, title: str, planted: Set[tuple[int, int]]) -> None:
    """Draws `values`, (Ly, h) in 0 .. 1, as a heat map; outlines the planted heads."""
    rows, heads = values.shape
    image = axes.imshow(values, vmin=0.0, vmax=1.0, cmap="cividis", aspect="auto")
    axes.set_title(title, fontsize=10, loc="left")
    wide = heads > 12
    axes.set_xticks(range(heads), [str(h) if wide else f"head {h}" for h in range(heads)], fontsize=8)
    axes.set_yticks(range(rows), [f"layer {layer}" for layer in layers], fontsize=8 if rows <= 16 else 7)
    if wide:
        axes.set_xlabel("head", fontsize=9)
    if values.size <= _MOST_CELLS:
        for (row, head), value in np.ndenumerate(values):
            colour = "black" if value > 0.55 else "white"
            axes.text(head, row, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=6.5 if wide else 8)
    for row, layer in enumerate(layers):
        for head in range(heads):
            if (int(layer), head) in planted:
                box = Rectangle((head - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=_OUTLINE, linewidth=2.2)
                axes.add_patch(box)
    axes.figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(labelsize=7)


def sinks(arrays: Mapping[str, np.ndarray], stage: str, planted: Set[tuple[int, int]] = frozenset()) -> Figure:
    """Sink frequency, share of attending queries and alpha of every measured head.

    Args:
        arrays: content of a sinks-STAGE.npz.
        stage: stage that the title names.
        planted: heads to outline, as (layer, head).
    """
    at, layers = _at_default(arrays), arrays["layers"]
    rows, heads = arrays["alpha"].shape[2:]
    eps = f"{arrays['default_eps']:g}"
    panels = {
        f"Sink frequency: share of prompts with a vision\nkey that over half of all queries give > {eps}": (
            arrays["frequency"][..., at].mean(axis=0)
        ),
        f"Largest share of queries\nthat give one vision key > {eps}": arrays["fraction"][..., at].mean(axis=(0, 1)),
        "Largest alpha: mean weight\nthat one vision key receives": arrays["alpha"].mean(axis=(0, 1)),
    }
    stacked = heads > 8 and rows <= 16
    if stacked:
        size = (4 + 0.42 * heads, 3 * (1.3 + 0.3 * rows))
    else:
        size = (3 * (2.6 + (0.34 if heads <= 8 else 0.17) * heads), 1.9 + (0.42 if rows <= 16 else 0.2) * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(3, 1) if stacked else figure.subplots(1, 3)
    for axes, (title, values) in zip(grid, panels.items(), strict=True):
        _heat_map(axes, values, layers, title.replace("\n", " ") if stacked else title, planted)
    prompts, sigmas = arrays["alpha"].shape[:2]
    note = "; outlined: sinks planted in the base" if planted else ""
    figure.suptitle(
        f"Attention sinks, {stage}: means over {prompts} prompts x {sigmas} noise levels, "
        f"up to {arrays['queries']} queries and {arrays['keys_count']} keys{note}",
        fontsize=10,
    )
    return figure


def sink_positions(arrays: Mapping[str, np.ndarray], stage: str) -> Figure | None:
    """Distribution of the sinks of all heads over latent frames and over positions in a frame; None without sinks.

    Args:
        arrays: content of a sinks-STAGE.npz.
        stage: stage that the title names.
    """
    at = _at_default(arrays)
    found = arrays["key"][..., at][arrays["fraction"][..., at] > 0.5]
    if not len(found):
        return None
    frames, height, width = arrays["grid"]
    counts = np.bincount(found, minlength=frames * height * width).reshape(frames, height, width)
    figure = Figure(figsize=(8.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(range(frames), counts.sum(axis=(1, 2)) / len(found), color=PALETTE[6])
    left.axhline(1 / frames, color="black", linewidth=1, linestyle="--", label="evenly spread")
    left.set(xlabel="latent frame t", ylabel="share of sinks", xticks=range(0, frames, max(1, frames // 12)))
    left.legend(fontsize=8, frameon=False)
    image = right.imshow(counts.sum(axis=0) / len(found), cmap="cividis", vmin=0.0)
    right.set(xlabel="x (tokens)", ylabel="y (tokens)")
    right.set_title("share of sinks by place in the frame", fontsize=10)
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=right, fraction=0.04)
    title = f"Where sinks sit, {stage}: {len(found)} sinks over prompts, noise levels and heads"
    if "frame_p" in arrays:
        title += f"; evenly spread: p = {arrays['frame_p']:.2g} over frames, {arrays['place_p']:.2g} over places"
    figure.suptitle(title, fontsize=10)
    return figure


def _style(index: int, scope: str) -> dict:
    """Line style of a scope: solid for several layers, dashed for one; each scope has its own colour and marker."""
    many = not scope.startswith("layer-")
    return {
        "color": PALETTE[index % (len(PALETTE) - 1)],  # the palette's yellow is too pale for a line
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": "-" if many else "--",
        "linewidth": 2.0 if many else 1.2,
        "markersize": 5,
    }


def _scope_label(scope: str) -> str:
    """Label of a scope: `layer-04` gives `layer 4`, `retrained` gives `retrained layers`."""
    name, _, rest = scope.partition("-")
    if name == "layer":
        return f"layer {int(rest)}"
    if name == "last":
        return f"last {rest} layers"
    return f"all but {', '.join(rest.split('-'))}" if name == "but" else f"{scope} layers"


#: Text in titles for each setting that differs from the default.
_OPTIONS = {
    ("masked_keys", "vision"): "on vision keys only",
    ("quantile", "row"): "thresholds per row",
    ("removed", "zero"): "not renormalised",
    ("removed", "mean"): "replaced by their mean",
}


def _options(arrays: Mapping[str, np.ndarray]) -> str:
    """Text for all settings that differ from the default, each after a comma; old arrays hold no settings."""
    return "".join(f", {text}" for (name, value), text in _OPTIONS.items() if str(arrays.get(name)) == value)


def masking(arrays: Mapping[str, np.ndarray], stage: str, tolerated: float = TOLERATED) -> Figure:
    """Distortion and relative loss increase against the masked share, one line per scope.

    Args:
        arrays: content of a masking-STAGE.npz.
        stage: stage that the title names.
        tolerated: relative loss increase that the critical ratio allows.
    """
    ratios, dense = arrays["ratios"], float(arrays["dense_loss"])
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for index, scope in enumerate(arrays["scopes"].tolist()):
        style = _style(index, scope)
        critical = arrays["critical_ratio"][index]
        measured = bears_on_attention(arrays["uniform_loss_increase"][index], tolerated * dense)
        reading = f"{'≥' if critical >= ratios[-1] else '='} {critical:.2f}" if measured else "not measured"
        label = f"{_scope_label(scope)}: r* {reading}"
        left.plot(ratios, np.maximum(arrays["distortion"][index], 1e-8), label=label, **style)
        right.plot([0, *ratios], [0, *arrays["loss_increase"][index] / dense], label=label, **style)
        # The control is drawn to the right of the curves.
        x = 1.02 + 0.02 * index
        left.plot(x, max(arrays["uniform_distortion"][index], 1e-8), **style | {"linestyle": "", "clip_on": False})
        right.plot(x, arrays["uniform_loss_increase"][index] / dense, **style | {"linestyle": "", "clip_on": False})
    last = 1.04 + 0.02 * len(arrays["scopes"])
    for axes in (left, right):
        axes.axvspan(1.0, last, color="0.92", zorder=0)
        axes.set(xlim=(0, last), xlabel="share r of the smallest attention weights removed")
        axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, (1 + last) / 2], ["0", "0.2", "0.4", "0.6", "0.8", "uniform"])
        axes.grid(True, color="0.85", linewidth=0.6)
    left.set_yscale("log")
    left.set_ylabel("distortion D(r) of the velocity")
    right.set_yscale("symlog", linthresh=tolerated, linscale=1.0)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    right.set_ylabel("loss increase dL(r) / L(0)")
    right.axhline(tolerated, color="black", linewidth=1, linestyle=":")
    increase = np.concatenate([arrays["loss_increase"].ravel(), arrays["uniform_loss_increase"]]) / dense
    increase = increase[np.isfinite(increase)]
    right.set_ylim(min(-0.3 * tolerated, 1.5 * increase.min(initial=0)), 1.5 * increase.max(initial=tolerated))
    title = f"masked layers, and the largest\nratio r* below {100 * tolerated:g} % (dotted)"
    lines = left.get_legend_handles_labels()
    if any(label.endswith("not measured") for label in lines[1]):
        title += "\n" + UNMEASURED.replace(": ", ":\n")
    figure.legend(*lines, fontsize=8, loc="outside right center", title=title, title_fontsize=8, frameon=False)
    figure.suptitle(
        f"Masking the smallest weights, {stage}: dense loss {dense:.4f}, {arrays['prompts']} prompts x "
        f"{len(arrays['sigmas'])} noise levels{_options(arrays)}; "
        "'uniform' replaces attention by the mean of its values",
        fontsize=10,
    )
    return figure
