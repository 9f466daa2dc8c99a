"""What a step computes: trunk, head, and the losses of the objective.

Legend: B batch, C channels, F latent frames, H W latent grid.
"""

import contextlib
import functools
from typing import Protocol, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from data.batch import Batch, EmptyCaption
from trainer.distillation import ObjectivePhase, Teacher, block_losses
from trainer.models.captions import Captions
from trainer.models.process import Process
from trainer.models.split_model import SplitModel
from trainer.models.state import State
from trainer.objective import Flow
from trainer.surgery import SurgeryConfig


@runtime_checkable
class EmptyCaptionSource(Protocol):
    """What a data module must offer for a family whose empty caption is an encoded one."""

    def empty_caption(self) -> EmptyCaption:
        """What the text encoders make of an empty text, the same on every rank and in every epoch."""
        ...


class TrunkHeadLosses(LightningModule):
    """Trunk without autograd, head with it, and the losses; `RetrainBlocks` builds it and trains it."""

    surgery: SurgeryConfig
    flow: Flow
    trunk_dtype: torch.dtype
    split_trunk: bool
    blocks: tuple[int, ...]
    split_model: SplitModel | None
    teacher: Teacher | None

    @property
    def first(self) -> int:
        """Index of the first retrained block: the trunk ends before it, the head begins with it."""
        return 0 if self.surgery.train_outside else self.blocks[0]

    @property
    def process(self) -> Process:
        """What noise does to a latent, and what is predicted of it."""
        assert self.split_model is not None
        return self.split_model.process

    def drop_captions(self, batch: Batch, epoch: int) -> Batch:
        """The batch with the captions that this epoch leaves out removed, as the family has them left out."""
        assert self.split_model is not None
        dropped, kind = self.flow.dropped(epoch, batch.uids), self.split_model.own_facts.empty_caption
        if kind == "encoded":
            return batch.with_empty_captions(dropped, self.empty_caption) if any(dropped) else batch
        return batch.without_captions(dropped, keep_lengths=kind == "zeros")

    @functools.cached_property
    def empty_caption(self) -> EmptyCaption:
        """The data module's encoded empty caption, on the host; read at the first use.

        Raises:
            ValueError: if the data are of a kind that has none.
        """
        source = getattr(self.trainer, "datamodule", None)
        if not isinstance(source, EmptyCaptionSource):
            raise ValueError(
                f"got data from {type(source).__name__} to train or measure without captions, expected a data module "
                "with empty_caption(). Use the latent data module, or set caption_dropout: 0 and unconditional: false."
            )
        return source.empty_caption()

    def trunk(self, x: Tensor, sigma: Tensor, batch: Batch) -> State:
        """Runs everything before the first retrained block, without autograd.

        Args:
            x: (B, C, F, H, W) noisy latents.
            sigma: (B,) float32 noise levels.
            batch: whose captions.
        """
        trains = self.surgery.train_outside or not self.split_trunk
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            with self._trunk_autocast(x.device):
                state = self.split_model.embed(x, self.process.timestep(sigma), Captions.of(batch))
                state = self.split_model.run(state, 0, self.first)
        # The head goes on in its own dtype, whatever the trunk computed in.
        return state if trains else state.map(lambda t: t.to(x.dtype) if t.is_floating_point() else t)

    def _trunk_autocast(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context in which modules of the trunk's dtype compute."""
        narrow = self.trunk_dtype != torch.float32
        return torch.autocast(device.type, self.trunk_dtype) if narrow else contextlib.nullcontext()

    def head(self, state: State) -> Tensor:
        """Runs the first retrained block and all that follows; gives the velocity (B, C, F, H, W)."""
        return self.split_model.finish(self.split_model.run(state, self.first, self.split_model.num_blocks))

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Predicted velocity at x_sigma, (B, C, F, H, W)."""
        return self.head(self.trunk(x, sigma, batch))

    def losses(self, batch: Batch, noise: Tensor, sigma: Tensor) -> Tensor:
        """The flow loss: mean squared error per sample, (B,) float32."""
        x = self.process.mix(batch.latents, noise, sigma)
        return _squared_error(self.velocity(x, sigma, batch), self.process.target(batch.latents, noise, sigma))

    def objective_losses(self, batch: Batch, noise: Tensor, sigma: Tensor, phase: ObjectivePhase) -> Tensor:
        """The weighted sum of a phase's losses per sample, (B,) float32.

        Args:
            batch: latents (B, C, F, H, W) and captions.
            noise: (B, C, F, H, W).
            sigma: (B,) float32 noise levels.
            phase: which losses.
        """
        state = self.trunk(self.process.mix(batch.latents, noise, sigma), sigma, batch)
        losses = torch.zeros(len(batch), device=sigma.device)
        if phase.needs_teacher:
            states = self.taught(state)
        if phase.blocks:
            losses = losses + phase.blocks * self.block_losses(states)
        if phase.needs_head:
            velocity = self.head(state)
            if phase.flow:
                target = self.process.target(batch.latents, noise, sigma)
                losses = losses + phase.flow * _squared_error(velocity, target)
            if phase.velocity:
                losses = losses + phase.velocity * _squared_error(velocity, self.taught_velocity(states))
        return losses

    def taught(self, state: State) -> dict[int, State]:
        """What the base's own blocks make of the trunk's output: `Teacher.states`."""
        assert self.teacher is not None and self.split_model is not None
        with self._trunk_autocast(state.vision.device):
            return self.teacher.states(self.split_model, state)

    @torch.no_grad()
    def taught_velocity(self, states: dict[int, State]) -> Tensor:
        """The velocity of the base, (B, C, F, H, W) float32."""
        assert self.split_model is not None
        with self._trunk_autocast(states[self.first].vision.device):
            return self.split_model.finish(states[self.split_model.num_blocks]).float()

    def block_losses(self, states: dict[int, State]) -> Tensor:
        """Error of each retrained block alone, (B,) float32: `trainer.distillation.block_losses`."""
        assert self.split_model is not None
        return block_losses(self.split_model, self.blocks, states)


def _squared_error(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, (B,) float32."""
    return (velocity.float() - target).square().flatten(1).mean(dim=1)
