"""Attention sinks on the probe set: which heads have them, how strong they are, and at which token.

Legend: P prompts, S sigmas, Ly measured layers, B probes of a batch, h heads, d head width, E eps values.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainer.attention import EPS, sink_statistics, sink_verdict
from trainer.callbacks import figures
from trainer.callbacks.intervals import wilson_interval
from trainer.callbacks.measurement_files import planted_heads
from trainer.callbacks.positions import position_p_values
from trainer.callbacks.probe_callback import ProbeCallback
from trainer.callbacks.probe_set import ProbeBatch, ProbeSet, refuse_key_mask
from trainer.callbacks.trunk_cache import TrunkForward
from trainer.models.layout import AttentionCall, dense_attention

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

#: A head is consistent if at least this share of prompts has a sink, at no less than this share of the sigmas.
CONSISTENT = 0.9

_PER_HEAD = (
    "fraction",
    "key",
    "text_fraction",
    "alpha",
    "alpha_key",
    "text_alpha",
    "value_norm_ratio",
    "projected_value_norm_ratio",
)


class SinkFrequency(ProbeCallback):
    """Measures attention sinks of every head: verdict per eps, alpha, value-norm ratios, position, frequency.

    Args:
        layers: layers to measure: `retrained`, `all`, or block indices.
        eps: thresholds above which an attention weight counts as heavy.
        default_eps: threshold for scalars and figures; one of `eps`.
        prompts: number of held-out samples.
        settings: arguments for `ProbeCallback`.
    """

    kind = "sinks"

    def __init__(
        self,
        *,
        layers: Literal["retrained", "all"] | list[int] = "retrained",
        eps: tuple[float, ...] = EPS,
        default_eps: float = 0.3,
        prompts: int = 14,
        **settings: Any,
    ) -> None:
        super().__init__(prompts=prompts, **settings)
        if default_eps not in eps or not all(0.0 < e < 1.0 for e in eps):
            raise ValueError(
                f"got eps={eps} with default_eps={default_eps}, expected values in 0 .. 1 that include it."
            )
        self.layers = layers
        self.eps = tuple(eps)
        self.default_eps = default_eps

    def check(self, module: "RetrainBlocks") -> None:
        if self.layers in ("retrained", "all"):
            return
        known = range(module.split_model.num_blocks)
        if not self.layers or not set(self.layers) <= set(known):
            raise ValueError(
                f"got layers={self.layers}, expected 'retrained', 'all' or block indices in 0 .. {known[-1]}."
            )

    def _measured(self, module: "RetrainBlocks") -> list[int]:
        named = {"retrained": module.blocks, "all": range(module.split_model.num_blocks)}
        return sorted(set(named[self.layers] if isinstance(self.layers, str) else self.layers))

    def observe(self, module: "RetrainBlocks", probes: ProbeBatch) -> dict[str, Tensor]:
        split_model, layers = module.split_model, self._measured(module)
        found: dict[str, Tensor] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            refuse_key_mask(call)
            vision = call.layout.num_vision
            projection = split_model.output_projection(call.layer)
            seen = sink_statistics(q, k, v, num_vision=vision, eps=self.eps, projection=projection)
            found.update({f"{call.layer}/{name}": getattr(seen, name) for name in _PER_HEAD})
            counts = (seen.queries, seen.keys, *call.layout.grid)
            found["size"] = torch.tensor(counts, dtype=torch.float64, device=q.device).expand(len(q), -1)
            return dense_attention(q, k, v, call)

        functions = dict.fromkeys(layers, attend)
        measures = f"sinks of layers {layers} at {self.eps}"
        state = self.trunk_cache.state(module, probes, TrunkForward(functions, measures=measures, found=found))
        with split_model.attention(functions):
            split_model.run(state, module.first, max(module.first, layers[-1] + 1))
        stacked = {name: torch.stack([found[f"{layer}/{name}"] for layer in layers], dim=1) for name in _PER_HEAD}
        return stacked | {"size": found["size"]}

    def summarise(
        self, module: "RetrainBlocks", probes: ProbeSet, tables: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        with_sink = sink_verdict(torch.from_numpy(tables["fraction"])).numpy()  # (P, S, Ly, h, E)
        frequency = with_sink.mean(axis=0)
        prompts = len(set(probes.caption_ids))
        low, high = wilson_interval(frequency * prompts, prompts)
        at = self.eps.index(self.default_eps)
        often = frequency[..., at] >= CONSISTENT  # (S, Ly, h)
        size = tables["size"].astype(np.int64)  # (P, S, 5)
        p_values = position_p_values(tables["key"][..., at], with_sink[..., at], size[0, 0, 2:], probes.caption_ids)
        return {
            "layers": np.array(self._measured(module)),
            "sigmas": np.array(probes.sigmas),
            "eps": np.array(self.eps),
            "default_eps": np.array(self.default_eps),
            "keys": np.array(probes.keys, dtype=np.str_),
            "caption_ids": np.array(probes.caption_ids),
            **{name: tables[name].astype(np.float32) for name in _PER_HEAD if "key" not in name},
            "key": tables["key"].astype(np.int32),
            "alpha_key": tables["alpha_key"].astype(np.int32),
            "frequency": frequency,
            "frequency_low": low,
            "frequency_high": high,
            "consistent": often.mean(axis=0) >= CONSISTENT,
            **{name: np.array(p) for name, p in p_values.items()},
            "grid": size[0, 0, 2:],
            "queries": size[..., 0].max(),
            "keys_count": size[..., 1].max(),
            "text_tokens": np.array(probes.text_tokens),
        }

    def scalars(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        at = list(arrays["eps"]).index(arrays["default_eps"])
        return {
            "heads": arrays["consistent"].sum(),
            "max_frequency": arrays["frequency"][..., at].mean(axis=0).max(),
            "max_fraction": arrays["fraction"][..., at].mean(axis=(0, 1)).max(),
            "alpha_max": arrays["alpha"].mean(axis=(0, 1)).max(),
        }

    def figures(self, module: "RetrainBlocks", arrays: Mapping[str, np.ndarray], stage: str) -> dict[str, Figure]:
        drawn = {"sinks": figures.sinks(arrays, stage, planted_heads(module.base))}
        positions = figures.sink_positions(arrays, stage)
        return drawn if positions is None else drawn | {"positions": positions}
