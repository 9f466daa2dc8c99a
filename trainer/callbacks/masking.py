"""What the velocity loses when the smallest attention weights are removed, on the probe set.

The threshold of each head is taken in a dense pass of the whole model on the same probe (an oracle); a second pass
removes what lies below it in the layers of a scope. How and why: docs/measurements.md.

Legend: P prompts, S sigmas, K scopes, R ratios, B probes of a batch, h heads, N tokens, d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from trainer.attention import masked_attention, pooled_quantiles, uniform_attention
from trainer.callbacks import figures
from trainer.callbacks.probes import SIGMAS, ProbeBatch, ProbeSet, refuse_key_mask
from trainer.callbacks.stages import ProbeCallback
from trainer.vdit.layout import AttentionCall, AttentionFunction, dense_attention
from trainer.vdit.mochi import State

if TYPE_CHECKING:
    from trainer.module import RetrainBlocks

#: The critical ratio is the largest one at which the loss rises by at most this share of the dense loss.
TOLERATED = 0.01
#: Keeps the logarithm of a distortion of zero finite.
FLOOR = 1e-8

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def critical_ratio(ratios: Sequence[float], relative_increase: Sequence[float]) -> float:
    """The largest ratio at which the loss is at most 1 % above the dense loss, read off the curve.

    The curve is linear between ratios and starts at ratio 0 with no increase. The largest ratio counts, not the first
    crossing: a curve that comes back below 1 % is judged by its last crossing. An increase that is no number counts
    as infinite.

    Args:
        ratios: R ascending shares.
        relative_increase: dL(r) / L(0) at each.
    """
    r = np.concatenate([[0.0], np.asarray(ratios, dtype=np.float64)])
    rise = np.concatenate([[0.0], np.nan_to_num(np.asarray(relative_increase, dtype=np.float64), nan=np.inf)])
    last = int(np.flatnonzero(rise <= TOLERATED)[-1])
    if last == len(r) - 1:
        return float(r[last])
    step = (TOLERATED - rise[last]) / (rise[last + 1] - rise[last])
    return float(r[last] + step * (r[last + 1] - r[last]))


@dataclass(frozen=True)
class _Dense:
    """One dense pass.

    Args:
        velocity: (B, C, F, H, W).
        thresholds: layer -> (B, h, R).
        states: block index -> what enters that block.
    """

    velocity: Tensor
    thresholds: Mapping[int, Tensor]
    states: Mapping[int, State]


class MaskingRobustness(ProbeCallback):
    """Distortion and loss of bottom-quantile masking, per scope and ratio, beside a uniform-attention control.

    Args:
        ratios: shares of the weights that are removed, ascending, each between 0 and 1.
        scopes: layers masked together: `retrained`, `each` (every retrained layer alone), `all`, `layer-45`, or
            `but-44-45` (all but these).
        prompts: how many held-out samples.
        sigmas: noise levels, each in 0 .. 1.
        seed: of the probes' noise.
        batch_size: probes measured together; None chooses by the size of a latent.
        base_stage: also measure the base's own weights.
        every_n_epochs: measure after every so many epochs, and after the last.
    """

    kind = "masking"

    def __init__(
        self,
        *,
        ratios: tuple[float, ...] = RATIOS,
        scopes: tuple[str, ...] = ("retrained", "each", "all"),
        prompts: int = 8,
        sigmas: tuple[float, ...] = SIGMAS,
        seed: int = 1234,
        batch_size: int | None = None,
        base_stage: bool = True,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(
            prompts=prompts,
            sigmas=sigmas,
            seed=seed,
            batch_size=batch_size,
            base_stage=base_stage,
            every_n_epochs=every_n_epochs,
        )
        if not ratios or list(ratios) != sorted(set(ratios)) or not 0.0 < min(ratios) <= max(ratios) < 1.0:
            raise ValueError(f"got ratios={tuple(ratios)}, expected ascending shares between 0 and 1, e.g. {RATIOS}.")
        if not scopes:
            raise ValueError("got no scopes, expected some of 'retrained', 'each', 'all', 'layer-45', 'but-44-45'.")
        self.ratios = tuple(ratios)
        self.scopes = tuple(scopes)

    def check(self, module: "RetrainBlocks") -> None:
        self._layers_of(module)

    def _layers_of(self, module: "RetrainBlocks") -> dict[str, list[int]]:
        """Scope -> the layers it masks, in the order of the arrays."""
        retrained, every = list(module.blocks), list(range(module.room.num_blocks))
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
            elif name == "but" and 0 < len(numbers) == len(named) and set(named) != set(every):
                found[scope] = [layer for layer in every if layer not in named]
            else:
                raise ValueError(
                    f"got scope {scope!r}, expected 'retrained', 'each', 'all', 'layer-N' or 'but-N-M' with layers in "
                    f"0 .. {every[-1]}."
                )
        return found

    # -- one batch of probes -------------------------------------------------------------------------------------

    def observe(self, module: "RetrainBlocks", probes: ProbeBatch) -> dict[str, Tensor]:
        scopes = self._layers_of(module)
        x = module.flow.mix(probes.batch.latents, probes.noise, probes.sigma)
        target = module.flow.target(probes.batch.latents, probes.noise)
        dense = self._dense_pass(module, x, probes, scopes)

        def rerun(layers: list[int], function: AttentionFunction) -> dict[str, Tensor]:
            with module.room.attention(dict.fromkeys(layers, function)):
                if layers[0] in dense.states:  # what lies before the scope is as in the dense pass
                    state = module.room.run(dense.states[layers[0]], layers[0], module.room.num_blocks)
                    velocity = module.room.finish(state)
                else:
                    velocity = module.velocity(x, probes.sigma, probes.batch)
            return {"change": _mean_square(velocity - dense.velocity), "loss": _mean_square(velocity - target)}

        rows = []
        for layers in scopes.values():
            rows.append([self._masked(dense.thresholds, index, layers, rerun) for index in range(len(self.ratios))])
        uniform = [rerun(layers, lambda q, k, v, call: uniform_attention(v)) for layers in scopes.values()]
        return {
            "energy": _mean_square(dense.velocity),
            "dense_loss": _mean_square(dense.velocity - target),
            **{
                name: torch.stack([torch.stack([r[name] for r in row], dim=1) for row in rows], dim=1)
                for name in rows[0][0]
            },
            **{f"uniform_{name}": torch.stack([found[name] for found in uniform], dim=1) for name in uniform[0]},
        }

    def _dense_pass(
        self, module: "RetrainBlocks", x: Tensor, probes: ProbeBatch, scopes: Mapping[str, list[int]]
    ) -> _Dense:
        room = module.room
        thresholds: dict[int, Tensor] = {}

        def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            refuse_key_mask(call)
            thresholds[call.layer] = pooled_quantiles(q, k, self.ratios)
            return dense_attention(q, k, v, call)

        starts = sorted({layers[0] for layers in scopes.values() if layers[0] >= module.first})
        states: dict[int, State] = {}
        with room.attention(dict.fromkeys(set().union(*scopes.values()), attend)):
            state, at = module.trunk(x, probes.sigma, probes.batch), module.first
            for start in starts:
                states[start] = state = room.run(state, at, start)
                at = start
            velocity = room.finish(room.run(state, at, room.num_blocks))
        return _Dense(velocity, thresholds, states)

    @staticmethod
    def _masked(
        thresholds: Mapping[int, Tensor],
        index: int,
        layers: list[int],
        rerun: Callable[[list[int], AttentionFunction], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        """One masked pass: (B,) of each figure; realised ratio and dropped mass are means over layers and heads."""
        removed: list[tuple[Tensor, Tensor]] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
            out, realised, dropped = masked_attention(q, k, v, thresholds[call.layer][..., index])
            removed.append((realised.mean(dim=1), dropped.mean(dim=1)))
            return out

        found = rerun(layers, attend)
        realised, dropped = (torch.stack(part).mean(dim=0) for part in zip(*removed, strict=True))
        return found | {"realised": realised, "dropped": dropped}

    # -- all of them ---------------------------------------------------------------------------------------------

    def summarise(
        self, module: "RetrainBlocks", probes: ProbeSet, tables: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        # tables: (P, S) dense, (P, S, K) uniform, (P, S, K, R) masked; means over probes before any quotient.
        energy, dense_loss = tables["energy"].mean(axis=0), tables["dense_loss"].mean(axis=0)  # (S,)
        change = np.moveaxis(tables["change"].mean(axis=0), 0, 1)  # (K, S, R)
        increase = np.moveaxis(tables["loss"].mean(axis=0), 0, 1) - dense_loss[:, None]
        distortion, loss_increase = change.mean(axis=1) / energy.mean(), increase.mean(axis=1)
        return {
            "ratios": np.array(self.ratios),
            "sigmas": np.array(probes.sigmas),
            "scopes": np.array(list(self._layers_of(module)), dtype=np.str_),
            "distortion": distortion,
            "loss_increase": loss_increase,
            "distortion_by_sigma": change / energy[:, None],
            "loss_increase_by_sigma": increase,
            "dense_loss": dense_loss.mean(),
            "dense_loss_by_sigma": dense_loss,
            "auc": np.log10(distortion + FLOOR).mean(axis=1),
            "critical_ratio": np.array([critical_ratio(self.ratios, row / dense_loss.mean()) for row in loss_increase]),
            "realised_ratio": tables["realised"].mean(axis=(0, 1)),
            "dropped_mass": tables["dropped"].mean(axis=(0, 1)),
            "uniform_distortion": tables["uniform_change"].mean(axis=(0, 1)) / energy.mean(),
            "uniform_loss_increase": tables["uniform_loss"].mean(axis=(0, 1)) - dense_loss.mean(),
            "prompts": np.array(len(probes.samples)),
            "samples": np.array(len(probes)),
        }

    def scalars(self, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
        found = {"dense_loss": float(arrays["dense_loss"])}
        for index, scope in enumerate(arrays["scopes"]):
            found[f"{scope}/critical_ratio"] = float(arrays["critical_ratio"][index])
            found[f"{scope}/auc"] = float(arrays["auc"][index])
            found[f"{scope}/uniform_loss_increase"] = float(arrays["uniform_loss_increase"][index])
        return found

    def figures(self, module: "RetrainBlocks", arrays: Mapping[str, np.ndarray], stage: str) -> dict[str, Figure]:
        return {"masking": figures.masking(arrays, stage, TOLERATED)}


def _mean_square(x: Tensor) -> Tensor:
    """Mean square of each sample, (B,) float32."""
    return x.float().square().flatten(1).mean(dim=1)
