"""Sinks of every head on the kept calls of dense drawings, the residual stream there, and which heads have a sink.

Legend: B rows of a call, P (prompt, seed) pairs, S kept steps, Ly studied layers, h heads, E eps values.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from launch.study.denoising import ModelCall
from launch.study.recorders import row_by_row
from launch.study.workbench import Workbench, rows_by_pass
from trainer.attention import sink_statistics, sink_verdict
from trainer.callbacks.activations import largest_and_median
from trainer.callbacks.sinks import CONSISTENT
from trainer.models.layout import AttentionFunction

#: Figures of a head, as `trainer.attention.sinks.SinkStatistics` defines them.
_PER_HEAD = (
    "fraction", "key", "text_fraction", "alpha", "alpha_key", "value_norm_ratio", "projected_value_norm_ratio",
)  # fmt: skip

Head = tuple[int, int]  # layer, head


def check_eps(eps: Sequence[float], default_eps: float) -> None:
    """Checks thresholds of a heavy weight.

    Raises:
        ValueError: if one is not between 0 and 1, or the default is none of them.
    """
    if not all(0.0 < value < 1.0 for value in eps) or default_eps not in eps or len(set(eps)) < len(eps):
        raise ValueError(
            f"got eps {list(eps)} with default_eps {default_eps:g}, expected different values above 0 and below 1 "
            "that include the default one."
        )


def record(work: Workbench, prompt: int, seed: int, eps: Sequence[float]) -> dict[str, NDArray]:
    """Figures of every head and of the residual stream on the kept calls of a dense drawing.

    Args:
        work: the workbench.
        prompt: index of the prompt.
        seed: of the noise.
        eps: E thresholds above which a weight is heavy.

    Returns:
        Arrays named `FIGURE_PASS`. Of a head, (S, Ly, h): those of `SinkStatistics` (`fraction` and `key` have a last
        axis E), `importance` and `text_importance`: the column mass of the vision key, and of the text key, with the
        most of it, over the mean column mass of all keys (vision and text). Of the vision stream after a block,
        (S, Ly): `stream_` and `largest`, `token`, `channel`, `median` of `largest_and_median`.
    """
    found: dict[str, list[NDArray]] = defaultdict(list)
    for call in work.dense(prompt, seed).calls:
        seen = _call(work, call, eps)
        for name, (row,) in rows_by_pass(call.passes):  # a drawing has one row of each pass
            for figure, values in seen.items():
                found[f"{figure}_{name}"].append(values[row])
    return {name: np.stack(values) for name, values in found.items()}


def _call(work: Workbench, call: ModelCall, eps: Sequence[float]) -> dict[str, NDArray]:
    """Figures of one call, (B, Ly, ...)."""
    rows: dict[int, list[dict[str, Tensor]]] = {layer: [] for layer in work.layers}
    streams: dict[int, dict[str, Tensor]] = {}
    functions = {layer: _recording(work, layer, eps, rows[layer]) for layer in work.layers}
    with vision_streams(work, streams):
        work.again(call, functions)
    heads = {
        name: torch.stack([torch.stack([row[name] for row in rows[layer]]) for layer in work.layers], dim=1)
        for name in rows[work.layers[0]][0]
    }
    stream = {
        f"stream_{name}": torch.stack([streams[layer][name] for layer in work.layers], dim=1)
        for name in streams[work.layers[0]]
    }
    return {name: values.cpu().numpy() for name, values in (heads | stream).items()}


def _recording(work: Workbench, layer: int, eps: Sequence[float], rows: list[dict[str, Tensor]]) -> AttentionFunction:
    """Dense attention that appends each row's figures, (h, ...), to `rows`."""
    projection = work.denoiser.split_model.output_projection(layer)
    vision = math.prod(work.grid)

    def keep(q: Tensor, k: Tensor, v: Tensor, row: int) -> None:
        seen = sink_statistics(q, k, v, num_vision=vision, eps=eps, projection=projection)
        # alpha is a column's mass over the queries, and the mean of that over the keys is 1 / keys.
        importance = {"importance": seen.alpha[0] * seen.keys, "text_importance": seen.text_alpha[0] * seen.keys}
        rows.append({name: getattr(seen, name)[0] for name in _PER_HEAD} | importance)

    return row_by_row(keep)


@contextlib.contextmanager
def vision_streams(work: Workbench, seen: dict[int, dict[str, Tensor]]) -> Iterator[None]:
    """Inside, every studied block leaves `largest_and_median` of its vision stream in `seen`, by layer."""

    def watch(layer: int) -> torch.utils.hooks.RemovableHandle:
        def after(block: torch.nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            # Blocks of all families give the vision stream alone, or first.
            seen[layer] = largest_and_median(output if isinstance(output, Tensor) else output[0])

        return work.denoiser.split_model.blocks[layer].register_forward_hook(after)

    handles = [watch(layer) for layer in work.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def with_sink(fraction: NDArray) -> NDArray:
    """Whether a head has a sink, from its largest heavy share: over half of the queries."""
    return sink_verdict(torch.from_numpy(np.asarray(fraction))).numpy()


def consistent(verdict: NDArray) -> NDArray:
    """Whether at least 90 % of the pairs have a sink, at no less than 90 % of the steps: (P, S, Ly, h) -> (Ly, h)."""
    often = verdict.mean(axis=0) >= CONSISTENT  # (S, Ly, h)
    return often.mean(axis=0) >= CONSISTENT


def chosen(mask: NDArray, layers: Sequence[int], heads: Sequence[int]) -> list[Head]:
    """The heads of a mask (layers, heads)."""
    return [(layers[row], heads[column]) for row, column in np.argwhere(mask)]


def head_names(heads: Sequence[Head]) -> list[str]:
    """Heads as `layer:head`."""
    return [f"{layer}:{head}" for layer, head in heads]


def find_sinks(work: Workbench, eps: float) -> list[Head]:
    """The studied heads that are consistent in any pass, on the kept calls of all prompts and seeds."""
    pairs = [(prompt, seed) for prompt in range(len(work.prompts)) for seed in work.config.seeds]
    records = [record(work, prompt, seed, (eps,)) for prompt, seed in pairs]
    heads = work.studied_heads
    found = np.zeros((len(work.layers), len(heads)), bool)
    for name in work.passes:
        fraction = np.stack([each[f"fraction_{name}"] for each in records])  # (P, S, Ly, h, 1)
        found |= consistent(with_sink(fraction[..., heads, 0]))
    return chosen(found, work.layers, heads)
