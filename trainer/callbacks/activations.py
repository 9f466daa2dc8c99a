"""Massive activations of the residual stream on the probe set: largest and median magnitude at each depth.

Legend: P prompts, S sigmas, Ly measured depths, B probes of a batch, N vision tokens, L text tokens, D width.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainer.callbacks.probe_callback import ProbeCallback
from trainer.callbacks.probe_set import ProbeBatch, ProbeSet

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

#: An entry is massive if its magnitude exceeds the first value, and exceeds the second value times the median.
#: Source: M. Sun et al., "Massive Activations in Large Language Models", arXiv 2402.17762.
MAGNITUDE, TIMES_MEDIAN = 100.0, 1000.0


def largest_and_median(stream: Tensor) -> dict[str, Tensor]:
    """Largest magnitude of a stream (B, N, D), its token and channel, and the median magnitude; each (B,)."""
    magnitude = stream.float().abs().flatten(1)
    largest, at = magnitude.max(dim=1)
    width = stream.shape[2]
    return {"largest": largest, "token": at // width, "channel": at % width, "median": magnitude.median(dim=1).values}


class MassiveActivations(ProbeCallback):
    """Measures the largest and median magnitude at the input of each block of the head, and at the last block's output.

    The vision stream also gives the token and channel of the largest. The text stream gives 0 without a caption.

    Args:
        prompts: number of held-out samples.
        settings: arguments for `ProbeCallback`.
    """

    kind = "activations"

    def __init__(self, *, prompts: int = 14, **settings: Any) -> None:
        super().__init__(prompts=prompts, **settings)

    def check(self, module: "RetrainBlocks") -> None:
        pass

    def observe(self, module: "RetrainBlocks", probes: ProbeBatch) -> dict[str, Tensor]:
        split_model, state = module.split_model, self.trunk_cache.state(module, probes)
        found: dict[str, list[Tensor]] = {}
        for depth in range(module.first, split_model.num_blocks + 1):
            seen = largest_and_median(state.vision)
            if state.layout.text_tokens:
                text = largest_and_median(state.text[:, : state.layout.text_tokens])
                seen |= {"text_largest": text["largest"], "text_median": text["median"]}
            else:
                seen |= dict.fromkeys(("text_largest", "text_median"), torch.zeros_like(seen["largest"]))
            for name, value in seen.items():
                found.setdefault(name, []).append(value)
            if depth < split_model.num_blocks:
                state = split_model.run(state, depth, depth + 1)
        return {name: torch.stack(values, dim=1) for name, values in found.items()}

    def summarise(
        self, module: "RetrainBlocks", probes: ProbeSet, tables: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        largest, median = tables["largest"], tables["median"]  # (P, S, Ly)
        return {
            "depths": np.arange(module.first, module.split_model.num_blocks + 1),
            "sigmas": np.array(probes.sigmas),
            "keys": np.array(probes.keys, dtype=np.str_),
            **{name: tables[name].astype(np.float32) for name in ("largest", "median", "text_largest", "text_median")},
            **{name: tables[name].astype(np.int32) for name in ("token", "channel")},
            "massive": (largest > MAGNITUDE) & (largest > TIMES_MEDIAN * median),
        }

    def scalars(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        times = arrays["largest"] / np.maximum(arrays["median"], 1e-12)
        return {
            "largest": arrays["largest"].mean(axis=(0, 1)).max(),
            "times_median": times.mean(axis=(0, 1)).max(),
            "massive_share": arrays["massive"].mean(axis=(0, 1)).max(),
        }

    def figures(self, module: "RetrainBlocks", arrays: Mapping[str, np.ndarray], stage: str) -> dict[str, Figure]:
        return {}
