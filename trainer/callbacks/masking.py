"""Measures on the probe set how the velocity changes when the smallest attention weights are removed.

A dense pass of the whole model on the same probe gives the threshold of each head (an oracle). A second pass removes
the weights below it in the layers of a scope. docs/measurements.md explains the method.

Legend: P prompts, S sigmas, K scopes, R ratios, B probes of a batch, h heads, N tokens, d head width.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainer.attention import masked_attention, pooled_quantiles, row_quantiles, uniform_attention
from trainer.callbacks import figures
from trainer.callbacks.masking_statistics import PER_PROBE, TOLERATED, bears_on_attention, masking_figures
from trainer.callbacks.probe_callback import ProbeCallback
from trainer.callbacks.probe_set import ProbeBatch, ProbeSet, refuse_key_mask
from trainer.callbacks.trunk_cache import TrunkCache, TrunkForward
from trainer.models.layout import AttentionCall, dense_attention
from trainer.models.state import State

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

#: Weights that are pooled and removed; set of weights that shares one threshold; replacement of a removed weight.
Keys = Literal["all", "vision"]
Quantile = Literal["head", "row"]
Removed = Literal["renormalise", "zero", "mean"]

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class _Dense:
    """Result of one dense pass.

    Args:
        velocity: output of the model, (B, C, F, H, W).
        thresholds: thresholds of each layer, (B, h, R), or (B, h, N, R) with one per row.
        states: input of each block at which a scope begins, by block index.
    """

    velocity: Tensor
    thresholds: Mapping[int, Tensor]
    states: Mapping[int, State]


class MaskingRobustness(ProbeCallback):
    """Measures bottom-quantile masking: distortion and loss by scope and ratio, with uniform attention as the control.

    Args:
        ratios: shares of the weights that are removed, ascending, each between 0 and 1.
        scopes: layers masked together: `retrained`, `each` (every retrained layer alone), `all`, `last-4`, `layer-45`,
            or `but-44-45` (all but these).
        keys: keys whose weights are pooled and removed: `all`, or `vision` for vision keys only.
        quantile: `head` for one threshold over all weights of a head, or `row` for one per query.
        removed: `renormalise` (logits of -inf), `zero` (the other weights stay as they are), or `mean` (each removed
            weight becomes the mean of the removed weights of its row).
        prompts: number of held-out samples.
        settings: arguments for `ProbeCallback`.
    """

    kind = "masking"

    def __init__(
        self,
        *,
        ratios: tuple[float, ...] = RATIOS,
        scopes: tuple[str, ...] = ("retrained", "each", "all"),
        keys: Keys = "all",
        quantile: Quantile = "head",
        removed: Removed = "renormalise",
        prompts: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(prompts=prompts, **settings)
        if not ratios or list(ratios) != sorted(set(ratios)) or not 0.0 < min(ratios) <= max(ratios) < 1.0:
            raise ValueError(f"got ratios={tuple(ratios)}, expected ascending shares between 0 and 1, e.g. {RATIOS}.")
        if not scopes:
            raise ValueError(
                "got no scopes, expected some of 'retrained', 'each', 'all', 'last-4', 'layer-45', 'but-44-45'."
            )
        for name, value, known in (
            ("keys", keys, Keys),
            ("quantile", quantile, Quantile),
            ("removed", removed, Removed),
        ):
            if value not in get_args(known):
                raise ValueError(f"got {name}={value!r}, expected one of {', '.join(get_args(known))}.")
        self.ratios = tuple(ratios)
        self.keys, self.quantile, self.removed = keys, quantile, removed
        self.scopes = tuple(scopes)

    def check(self, module: "RetrainBlocks") -> None:
        self._layers_of(module)

    def _layers_of(self, module: "RetrainBlocks") -> dict[str, list[int]]:
        """The layers that each scope masks; scopes are in the order of the arrays."""
        retrained, every = list(module.blocks), list(range(module.split_model.num_blocks))
        found: dict[str, list[int]] = {}
        for scope in self.scopes:
            name, *numbers = scope.split("-")
            named = [int(n) for n in numbers if n.isdecimal() and int(n) in every]
            if scope == "each":
                found |= {f"layer-{layer:02d}": [layer] for layer in retrained}
            elif scope in ("retrained", "all"):
                found[scope] = retrained if scope == "retrained" else every
            elif name == "layer" and len(numbers) == len(named) == 1:
                found[f"layer-{named[0]:02d}"] = named
            elif name == "last" and len(numbers) == 1 and numbers[0].isdecimal() and 0 < int(numbers[0]) <= len(every):
                found[scope] = every[-int(numbers[0]) :]
            elif name == "but" and 0 < len(numbers) == len(named) and set(named) != set(every):
                found[scope] = [layer for layer in every if layer not in named]
            else:
                raise ValueError(
                    f"got scope {scope!r}, expected 'retrained', 'each', 'all', 'last-N', 'layer-N' or 'but-N-M' with "
                    f"layers in 0 .. {every[-1]}."
                )
        return found

    def _scope_layers(self, module: "RetrainBlocks") -> np.ndarray:
        """Whether a scope masks a layer, (K, layers)."""
        masked = np.zeros((len(self._layers_of(module)), module.split_model.num_blocks), dtype=np.bool_)
        for row, layers in zip(masked, self._layers_of(module).values(), strict=True):
            row[layers] = True
        return masked

    # -- one batch of probes -------------------------------------------------------------------------------------

    def observe(self, module: "RetrainBlocks", probes: ProbeBatch) -> dict[str, Tensor]:
        scopes = self._layers_of(module)
        target = module.process.target(probes.batch.latents, probes.noise, probes.sigma)
        dense = self._dense_pass(module, probes, scopes)

        def compared(velocity: Tensor) -> dict[str, Tensor]:
            return {"change": _mean_square(velocity - dense.velocity), "loss": _mean_square(velocity - target)}

        masked, uniform = [], []
        for layers in scopes.values():
            row = []
            for index in range(len(self.ratios)):
                velocity, removed = self._masked(module, probes, dense, layers, index)
                row.append(compared(velocity) | removed)
            masked.append({name: torch.stack([figures[name] for figures in row], dim=1) for name in row[0]})
            evenly = TrunkForward(dict.fromkeys(layers, lambda q, k, v, call: uniform_attention(v)), changes="uniform")
            uniform.append(compared(_rerun(module, self.trunk_cache, probes, dense, evenly)))
        return {
            "energy": _mean_square(dense.velocity),
            "dense_loss": _mean_square(dense.velocity - target),
            **{name: torch.stack([found[name] for found in masked], dim=1) for name in masked[0]},
            **{f"uniform_{name}": torch.stack([found[name] for found in uniform], dim=1) for name in uniform[0]},
        }

    def _dense_pass(self, module: "RetrainBlocks", probes: ProbeBatch, scopes: Mapping[str, list[int]]) -> _Dense:
        split_model = module.split_model
        found: dict[str, Tensor] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            refuse_key_mask(call)
            quantiles = pooled_quantiles if self.quantile == "head" else row_quantiles
            found[str(call.layer)] = quantiles(q, k, self.ratios, num_keys=self._num_keys(call))
            return dense_attention(q, k, v, call)

        layers = sorted(set().union(*scopes.values()))
        functions = dict.fromkeys(layers, attend)
        measures = f"{self.quantile} quantiles of layers {layers} at {self.ratios}, {self.keys} keys"
        state = self.trunk_cache.state(module, probes, TrunkForward(functions, measures=measures, found=found))
        at, states = module.first, {}
        with split_model.attention(functions):
            for start in sorted({layers[0] for layers in scopes.values() if layers[0] >= module.first}):
                states[start] = state = split_model.run(state, at, start)
                at = start
            velocity = split_model.finish(split_model.run(state, at, split_model.num_blocks))
        return _Dense(velocity, {layer: found[str(layer)] for layer in layers}, states)

    def _num_keys(self, call: AttentionCall) -> int | None:
        """Number of leading keys whose weights may be removed; None for all keys."""
        return call.layout.num_vision if self.keys == "vision" else None

    def _masked(
        self, module: "RetrainBlocks", probes: ProbeBatch, dense: _Dense, layers: list[int], index: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Velocity of one masked pass; realised ratio and dropped mass, each (B,), means over layers and heads."""
        found: dict[str, Tensor] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            out, realised, dropped = masked_attention(
                q,
                k,
                v,
                dense.thresholds[call.layer][..., index],
                num_keys=self._num_keys(call),
                renormalise=self.removed == "renormalise",
                tail="mean" if self.removed == "mean" else "zero",
            )
            found[f"{call.layer}/realised"], found[f"{call.layer}/dropped"] = realised.mean(dim=1), dropped.mean(dim=1)
            return out

        settings = f"{self.ratios[index]} of {self.ratios}, {self.quantile}, {self.keys} keys, {self.removed}"
        masking = TrunkForward(dict.fromkeys(layers, attend), f"masked at {settings}", "what was removed", found)
        velocity = _rerun(module, self.trunk_cache, probes, dense, masking)
        removed = {
            name: torch.stack([found[f"{layer}/{name}"] for layer in layers]).mean(dim=0)
            for name in ("realised", "dropped")
        }
        return velocity, removed

    # -- all batches ---------------------------------------------------------------------------------------------

    def summarise(
        self, module: "RetrainBlocks", probes: ProbeSet, tables: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        # tables: (P, S) dense, (P, S, K) uniform, (P, S, K, R) masked. Quotients are taken of means over probes.
        energy, dense_loss = tables["energy"].mean(axis=0), tables["dense_loss"].mean(axis=0)  # (S,)
        change = np.moveaxis(tables["change"].mean(axis=0), 0, 1)  # (K, S, R)
        increase = np.moveaxis(tables["loss"].mean(axis=0), 0, 1) - dense_loss[:, None]
        means = {name: tables[name].mean(axis=(0, 1)) for name in PER_PROBE}
        return {
            "ratios": np.array(self.ratios),
            "sigmas": np.array(probes.sigmas),
            "scopes": np.array(list(self._layers_of(module)), dtype=np.str_),
            "scope_layers": self._scope_layers(module),
            "masked_keys": np.array(self.keys),
            "quantile": np.array(self.quantile),
            "removed": np.array(self.removed),
            **masking_figures(means, self.ratios),
            "distortion_by_sigma": change / energy[:, None],
            "loss_increase_by_sigma": increase,
            "dense_loss_by_sigma": dense_loss,
            "realised_ratio": tables["realised"].mean(axis=(0, 1)),
            "dropped_mass": tables["dropped"].mean(axis=(0, 1)),
            "uniform_distortion": tables["uniform_change"].mean(axis=(0, 1)) / energy.mean(),
            # Of every probe, for intervals clustered by prompt.
            **{f"{name}_by_probe": tables[name].astype(np.float32) for name in (*PER_PROBE, "uniform_change")},
            "keys": np.array(probes.keys, dtype=np.str_),
            "caption_ids": np.array(probes.caption_ids),
            "prompts": np.array(len(probes.samples)),
            "samples": np.array(len(probes)),
        }

    def scalars(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        found = {"dense_loss": float(arrays["dense_loss"])}
        measured = bears_on_attention(arrays["uniform_loss_increase"], TOLERATED * arrays["dense_loss"])
        for index, scope in enumerate(arrays["scopes"]):
            if measured[index]:
                found[f"{scope}/critical_ratio"] = float(arrays["critical_ratio"][index])
            found[f"{scope}/auc"] = float(arrays["auc"][index])
            found[f"{scope}/uniform_loss_increase"] = float(arrays["uniform_loss_increase"][index])
        return found

    def figures(self, module: "RetrainBlocks", arrays: Mapping[str, np.ndarray], stage: str) -> dict[str, Figure]:
        return {"masking": figures.masking(arrays, stage, TOLERATED)}


def _rerun(
    module: "RetrainBlocks", trunk_cache: TrunkCache, probes: ProbeBatch, dense: _Dense, changed: TrunkForward
) -> Tensor:
    """Velocity with the attention functions of `changed`; layers before them are as in the dense pass."""
    split_model, at = module.split_model, min(changed.functions)
    if at in dense.states:
        state = dense.states[at]
    else:
        named = replace(changed, changes=f"{changed.changes} in layers {sorted(changed.functions)}")
        state, at = trunk_cache.state(module, probes, named), module.first
    with split_model.attention(changed.functions):
        return split_model.finish(split_model.run(state, at, split_model.num_blocks))


def _mean_square(x: Tensor) -> Tensor:
    """Mean square of each sample, (B,) float32."""
    return x.float().square().flatten(1).mean(dim=1)
