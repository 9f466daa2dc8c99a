"""Losses against the base's own blocks as teacher, and the phases of a run with the weight of each loss.

The teacher starts from the trunk's output that the retrained blocks start from, so it needs no second trunk pass.

Legend: B batch, N vision tokens, L text tokens, D width.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.models.split_model import SplitModel
from trainer.models.state import State

#: A change below this share of a state's mean square counts as this share, against division by zero.
_LEAST_CHANGE = 1e-6


@dataclass(kw_only=True)
class ObjectivePhase:
    """A part of the run, and the weights of the losses in it.

    Args:
        steps: optimiser steps that the phase lasts; None for the last one, which lasts as long as the run.
        flow: weight of the flow loss, the mean squared error against data minus noise.
        velocity: weight of the mean squared error against the velocity of the base.
        blocks: weight of the error of each retrained block alone. Each gets the base's activations before it and learns
            those after it.
    """

    steps: int | None = None
    flow: float = 0.0
    velocity: float = 0.0
    blocks: float = 0.0

    @property
    def needs_head(self) -> bool:
        """Whether the retrained blocks run one after the other, to the velocity."""
        return self.flow > 0 or self.velocity > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the base's own blocks run."""
        return self.velocity > 0 or self.blocks > 0

    @property
    def cost(self) -> int:
        """Relative work of the phase: 1 for the teacher, 3 each for head and blocks, which also run backward."""
        return 3 * self.needs_head + 3 * (self.blocks > 0) + self.needs_teacher


#: The default, and the objective that Mochi was trained with.
FLOW_ALONE = (ObjectivePhase(flow=1.0),)


def check_phases(phases: Sequence[ObjectivePhase], *, trains_trunk: bool = False) -> None:
    """Checks that each phase but the last has an end, that each learns something, with a teacher where it needs one.

    Args:
        phases: of a run, in order.
        trains_trunk: whether the run trains the trunk too.

    Raises:
        ValueError: naming every fault.
    """
    faults = []
    steps = [phase.steps for phase in phases]
    if not steps or steps[-1] is not None or any(count is None or count < 1 for count in steps[:-1]):
        faults.append(f"got phases of {steps} steps, expected 1 or more, and null in the last phase alone.")
    for number, phase in enumerate(phases):
        weights = {"flow": phase.flow, "velocity": phase.velocity, "blocks": phase.blocks}
        if not all(0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
            faults.append(f"got weights {weights} in phase {number}, expected all at least 0 and one above.")
        if phase.needs_teacher and trains_trunk:
            faults.append(
                f"got weights {weights} in phase {number} with surgery.train_outside, expected flow alone: a teacher "
                "needs a trunk that stays as it is."
            )
    if faults:
        raise ValueError("\n".join(f"model.objective: {fault}" for fault in faults))


def phase_at(phases: Sequence[ObjectivePhase], step: int) -> ObjectivePhase:
    """The phase of a step.

    Args:
        phases: checked by `check_phases`.
        step: optimiser steps taken so far.
    """
    for phase in phases:
        if phase.steps is None or step < phase.steps:
            return phase
        step -= phase.steps
    raise ValueError(f"got no phase for step {step}, expected a last phase without end.")


class Teacher(nn.Module):
    """Frozen copies of the base's own blocks in place of the retrained ones.

    Args:
        split_model: the model that is retrained, whose blocks still hold the base's weights.
        layers: indices of the retrained blocks.
        dtype: of the copies, but for what diffusers keeps in float32, and LayerNorms.
    """

    def __init__(self, split_model: SplitModel, layers: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = tuple(layers)
        own = split_model.blocks
        self.blocks = nn.ModuleList(copy.deepcopy(own[layer]) for layer in self.layers)
        self.blocks.requires_grad_(False)
        for block in self.blocks:
            for name, parameter in block.named_parameters():
                if not split_model.keeps_float32(name):
                    parameter.data = parameter.data.to(dtype)
        for module in self.blocks.modules():
            if isinstance(
                module, nn.LayerNorm
            ):  # on a CPU its input, the float32 state, and its weights need one dtype
                module.float()

    @torch.no_grad()
    def states(self, split_model: SplitModel, state: State) -> dict[int, State]:
        """Layer -> the activations before it, from the first retrained layer on; `num_blocks` -> those after the last.

        Args:
            split_model: the model that is retrained: it has the frozen blocks between the retrained ones.
            state: the activations before the first retrained block.
        """
        first = self.layers[0]
        blocks = dict(zip(self.layers, self.blocks, strict=True))
        states = {first: state}
        for layer in range(first, split_model.num_blocks):
            before = states[layer]
            own = blocks.get(layer)
            after = split_model.run(before, layer, layer + 1) if own is None else split_model.run_block(own, before)
            states[layer + 1] = after
        return states


def block_losses(split_model: SplitModel, layers: Sequence[int], states: Mapping[int, State]) -> Tensor:
    """Error of each retrained block alone, as a share of the teacher's change: a block that does nothing has 1.

    A stream's error is its mean squared error over the mean square of the teacher's change, per sample. A block's is
    the mean over its streams: vision, and text where the block changes it and the sample has a caption. The loss is the
    mean over blocks.

    Args:
        split_model: holds the retrained blocks.
        layers: their indices.
        states: of `Teacher.states`.

    Returns:
        (B,) float32.
    """
    losses = []
    for layer in layers:
        before, wanted = states[layer], states[layer + 1]
        found = split_model.run(before, layer, layer + 1)
        every = torch.ones(before.vision.shape[:2], dtype=torch.bool, device=before.vision.device)
        loss = _relative_error(found.vision, before.vision, wanted.vision, every)
        if split_model.changes_text(layer):
            valid = _valid_text(before)
            loss = loss + _relative_error(found.text, before.text, wanted.text, valid)
            loss = loss / (1 + valid.any(dim=1))
        losses.append(loss)
    return torch.stack(losses).mean(dim=0)


def _valid_text(state: State) -> Tensor:
    """(B, L) bool, true on the tokens of the captions."""
    lengths = torch.tensor(state.layout.text_lengths).to(state.text.device, non_blocking=True)
    return torch.arange(state.text.shape[1], device=state.text.device) < lengths[:, None]


def _relative_error(found: Tensor, before: Tensor, wanted: Tensor, valid: Tensor) -> Tensor:
    """Squared error over the squared change from `before` to `wanted`, (B,) float32; 0 where no token is valid.

    Args:
        found: (B, N, D) what a block made of `before`.
        before: (B, N, D).
        wanted: (B, N, D).
        valid: (B, N) bool, tokens that count.
    """

    def total(x: Tensor) -> Tensor:
        return torch.where(valid[..., None], x.float(), 0.0).square().sum(dim=(1, 2))

    change = total(wanted.float() - before.float()).clamp_min(_LEAST_CHANGE * total(wanted))
    return total(found.float() - wanted.float()) / torch.where(change > 0, change, 1.0)
