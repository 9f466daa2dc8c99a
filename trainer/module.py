"""The LightningModule: how it is built, one training step, validation, optimisation.

Legend: B batch, C channels, F latent frames, H W latent grid.
"""

import contextlib
import logging
from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from data.batch import Batch
from trainer.checkpoint.content import load_module_state, save_module_state
from trainer.compile import CompiledPart, compile_blocks
from trainer.distillation import FLOW_ALONE, ObjectivePhase, Teacher, check_phases, phase_at
from trainer.ema import Ema, check_decay, swapped_values
from trainer.graft import base_block_weights
from trainer.losses import TrunkHeadLosses
from trainer.models.families import split_model_of
from trainer.models.load import check_base, load_transformer, read_config, read_facts, read_scheduler
from trainer.models.split_model import SplitModel
from trainer.objective import Flow, SigmaSampler
from trainer.optimizer import OptimConfig, adamw, clip_or_drop, learning_rate, scale_gradients
from trainer.parallel.combinations import check_shards, check_trainer
from trainer.parallel.sharded_tensors import full_tensor
from trainer.parallel.strategies import build_device, distribute
from trainer.rank_sums import RankSums
from trainer.schedule import check_end, warn_of_unreached
from trainer.step_figures import StepFigures, tokens_of
from trainer.surgery import SurgeryConfig as SurgeryConfig
from trainer.surgery import apply_surgery, check_held, check_planted, choose_blocks, frozen_fingerprint

log = logging.getLogger(__name__)


class _RestoreLiveWeights(Callback):
    """Restores the live weights if validation raises: a checkpoint saved after that must not hold averages instead."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, RetrainBlocks):
            pl_module.end_evaluation()


class RetrainBlocks(TrunkHeadLosses):
    """Retrains re-initialised blocks of a frozen video diffusion transformer.

    Args:
        base: diffusers folder, transformer folder, hub id, or a `config.json` (random weights).
        surgery: which blocks, and how they start.
        optim: optimiser and schedule.
        objective: the losses of each phase of the run; the flow loss throughout if none is given.
        sigma: distribution of sigma.
        sigma_shift: c of s <- c s / (1 + (c - 1) s), which moves drawn sigmas towards noise, as a sampler's shift does.
        caption_dropout: share of samples trained without caption.
        seed: of sigma, noise and caption dropout in training. The noise of validation is always the same.
        ema_decay: decay of the average used for validation and export.
        trunk_dtype: dtype of the frozen trunk's weights; `bfloat16` halves their memory.
        checkpoint_head: recompute activations of head blocks in the backward pass.
        compile: blocks that training steps run through torch.compile: `none`, `trunk`, `head` or `both`.
        stock_attention: run diffusers' own attention processor (for comparisons only).
        split_trunk: run the trunk under no_grad. False only for a comparison in the benchmarks.
        val_sigmas: sigmas at which validation loss is measured.
    """

    def __init__(
        self,
        *,
        base: str,
        surgery: SurgeryConfig,
        optim: OptimConfig | None = None,
        objective: tuple[ObjectivePhase, ...] | None = None,
        sigma: SigmaSampler = "uniform",
        sigma_shift: float = 1.0,
        caption_dropout: float = 0.1,
        seed: int = 0,
        ema_decay: float = 0.999,
        trunk_dtype: str = "float32",
        checkpoint_head: bool = False,
        compile: CompiledPart = "none",
        stock_attention: bool = False,
        split_trunk: bool = True,
        val_sigmas: tuple[float, ...] = (0.125, 0.375, 0.625, 0.875),
    ) -> None:
        super().__init__()
        if trunk_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"got trunk_dtype {trunk_dtype!r}, expected 'float32' or 'bfloat16'.")
        if surgery.train_outside and trunk_dtype != "float32":
            raise ValueError("got trunk_dtype 'bfloat16' with surgery.train_outside, expected 'float32': all trained.")
        if compile != "none" and stock_attention:
            raise ValueError(
                f"got compile {compile!r} with stock_attention, which waits for the device; leave one out."
            )
        check_decay(ema_decay)
        self.phases = FLOW_ALONE if objective is None else tuple(objective)
        check_phases(self.phases, trains_trunk=surgery.train_outside)
        self.base = base
        self.surgery = surgery
        self.optim = optim or OptimConfig()
        check_held(surgery, self.optim.weight_decay)
        self.flow = Flow(sigma=sigma, sigma_shift=sigma_shift, caption_dropout=caption_dropout, seed=seed)
        self.ema_decay = ema_decay
        self.trunk_dtype = getattr(torch, trunk_dtype)
        self.checkpoint_head = checkpoint_head
        self.compile_part = compile
        self.stock_attention = stock_attention
        self.split_trunk = split_trunk
        self.val_sigmas = val_sigmas
        self.split_model: SplitModel | None = None
        self.teacher: Teacher | None = None
        self.ema: Ema | None = None
        self._step = StepFigures()
        #: Samples, tokens and damaged samples of the last optimiser step, over its micro-batches and all ranks.
        self.step_counts: dict[str, Tensor] = {}
        self._validation_sums = RankSums([*(f"loss at {value}" for value in val_sigmas), "samples"])
        self._evaluation = contextlib.ExitStack()  # during validation: restores the live weights when closed
        self.skipped = 0
        self.skipped_in_row = 0
        self.strict_loading = False  # a checkpoint holds no frozen weight

    # -- building ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Checks base and block choice, before anything is loaded.

        Raises:
            ValueError: if the base is missing or incomplete, or the blocks are not its own.
        """
        facts = read_facts(check_base(self.base))
        self.retrained_blocks(facts.num_blocks)
        check_planted(self.surgery, self.base)

    def check_data(self, latent_shape: tuple[int, ...], text_width: int) -> None:
        """Checks that shards of (C, F, H, W) latents and captions of `text_width` fit the base.

        Raises:
            ValueError: if they do not.
        """
        check_shards(self.base, latent_shape, text_width)

    def check_trainer(self, trainer: Trainer) -> None:
        """Checks that the Trainer's strategy, precision and clipping fit what is retrained.

        Raises:
            ValueError: naming every fault.
        """
        clip, precision = trainer.gradient_clip_val, str(trainer.precision)
        check_trainer(type(trainer.strategy), precision, clip, self.surgery, split_trunk=self.split_trunk)
        check_end(self.optim, trainer)

    def retrained_blocks(self, num_blocks: int) -> tuple[int, ...]:
        return choose_blocks(num_blocks, last=self.surgery.last, blocks=self.surgery.blocks)

    def configure_model(self) -> None:
        if self._trainer is None:
            return self.build("cpu") if self.split_model is None else None
        strategy = self.trainer.strategy
        self.check_trainer(self.trainer)
        if self.split_model is None:
            self.build(build_device(strategy, self.base))
        distribute(self, strategy)

    def build(self, device: torch.device | str) -> None:
        """Loads the base onto `device`, re-initialises the retrained blocks, freezes the rest, starts the averages."""
        self.blocks = self.retrained_blocks(read_facts(read_config(self.base)).num_blocks)
        model = load_transformer(
            self.base, device=device, dtype=self.trunk_dtype, seed=self.surgery.seed, float32_from=self.first
        )
        model.train()  # as Lightning expects a module under training; Mochi has no dropout
        self.split_model = split_model_of(
            model, scheduler=read_scheduler(self.base), stock_attention=self.stock_attention,
            checkpoint_blocks=self.checkpoint_head,
        )  # fmt: skip
        if self.needs_teacher:
            self.teacher = Teacher(self.split_model, self.blocks, self.trunk_dtype)
            if self.compile_part in ("trunk", "both"):
                compile_blocks(self.teacher.blocks, 0, "both")
        apply_surgery(self.split_model, self.blocks, self.surgery)
        compile_blocks(self.split_model.blocks, self.first, self.compile_part)
        self.ema = Ema(self.retrained_parameters(), decay=self.ema_decay)

    @property
    def needs_teacher(self) -> bool:
        """Whether a phase of the run learns from the base's own blocks."""
        return any(phase.needs_teacher for phase in self.phases)

    def retrained_parameters(self) -> dict[str, Tensor]:
        """Name in the diffusers transformer -> trained parameter."""
        return {name: p for name, p in self.split_model.transformer.named_parameters() if p.requires_grad}

    # -- one step ------------------------------------------------------------------------------------------------

    @property
    def current_phase(self) -> ObjectivePhase:
        """The phase of the run that the next step belongs to."""
        return phase_at(self.phases, self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        epoch, device = self.current_epoch, batch.latents.device
        host_sigma = self.flow.sigma(epoch, batch.uids)
        noise = self.flow.noise(epoch, batch.uids, batch.latents.shape[1:]).to(device, non_blocking=True)
        batch = self.drop_captions(batch, epoch)
        losses = self.objective_losses(batch, noise, host_sigma.to(device, non_blocking=True), self.current_phase)
        loss = losses.mean()
        tokens = tokens_of(batch, self.split_model.patch)
        self._step.add(losses.detach(), host_sigma, tokens=tokens, faults=batch.faults)
        # One that is not finite makes all gradients so, by the all-reduce on every rank: then all skip the step.
        return loss * (loss - loss + 1).detach()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:  # where Lightning sets the gradients to zero
            self._step.restart()

    def _log_step(self) -> None:
        """Logs the losses of an optimiser step over its micro-batches and all ranks, and keeps what it counted."""
        losses, self.step_counts = self._step.finish(self.device)
        for name, loss in losses.items():
            # For a band that is not logged Lightning repeats the last value; NaN says that no sample fell into it.
            self.log(name, loss, on_step=True, prog_bar=name == "train/loss")

    # -- validation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # A sample that is repeated only so that all ranks have equally many does not count.
        counts = torch.tensor(batch.counts).to(batch.latents.device, non_blocking=True)
        noise = self.flow.held_out_noise(batch.uids, batch.latents.shape[1:]).to(batch.latents.device)
        sums = []
        for value in self.val_sigmas:
            sigma = torch.full((len(batch),), value, device=noise.device)
            losses = self.losses(batch, noise, sigma).double()
            sums.append(torch.where(counts, losses, 0.0).sum())
        self._validation_sums.add(torch.stack([*sums, counts.sum()]))

    def _log_validation(self) -> None:
        """Logs mean losses over the held-out samples of all ranks."""
        *losses, samples = self._validation_sums.over_ranks(self.device).values()
        means = {f"{value:.3f}": loss / samples for value, loss in zip(self.val_sigmas, losses, strict=True)}
        # They are the same on every rank: `max` leaves them as they are, and without sync_dist Lightning would warn.
        for sigma, mean in means.items():
            self.log(f"val/loss_sigma_{sigma}", mean.float(), sync_dist=True, reduce_fx="max")
        loss = (sum(losses) / samples / len(losses)).float()
        self.log("val/loss", loss, prog_bar=True, sync_dist=True, reduce_fx="max")

    def on_validation_epoch_start(self) -> None:
        self._validation_sums.reset()  # of a validation that was cut
        self._evaluation.enter_context(self.evaluation_weights())

    def on_validation_epoch_end(self) -> None:
        self._log_validation()
        self.end_evaluation()

    def end_evaluation(self) -> None:
        """Restores the live weights of the retrained blocks, if validation has replaced them by their averages."""
        self._evaluation.close()

    def configure_callbacks(self) -> list[Callback]:
        return [_RestoreLiveWeights()]

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the retrained blocks hold their EMA weights."""
        return self.ema.swapped_in()

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Inside, the retrained blocks hold the base's own weights, read again from its files."""
        live = self.retrained_parameters()
        own = base_block_weights(self.base, live, seed=self.surgery.seed, dtype=self.trunk_dtype, device=self.device)
        with swapped_values(live, own):
            yield

    # -- optimisation --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = adamw(self.retrained_parameters(), self.optim, fused=self.device.type == "cuda")
        schedule = learning_rate(optimizer, self.optim, lambda: self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Makes the gradients those of the step's mean loss, and clips them.

        Where their norm is not finite, drops them all, so that the step changes nothing.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        # Lightning divides the loss of every micro-batch by `whole`, also where an epoch's last step has fewer.
        whole, taken = self.trainer.accumulate_grad_batches, self._step.micro_batches
        if taken != whole:
            scale_gradients(parameters, whole / taken)
        norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        self.log("train/grad_norm", norm, on_step=True)
        if clip_or_drop(parameters, norm, self.optim.clip_norm):
            self.skipped_in_row = 0
            return
        self.skipped += 1
        self.skipped_in_row += 1
        log.warning("step %d has a non-finite loss or gradient and is skipped", self.global_step)
        if self.skipped_in_row > self.optim.max_skipped_in_row:
            raise RuntimeError(
                f"{self.skipped_in_row} steps in a row had a non-finite loss or gradient (limit "
                f"{self.optim.max_skipped_in_row}); stopped at step {self.global_step}. Lower optim.lr, "
                "check the latents with `reblock inspect`, or raise optim.max_skipped_in_row."
            )

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.skipped_in_row == 0:
            self.ema.update()
        self._log_step()
        self.log("train/lr", optimizer.param_groups[0]["lr"], on_step=True)
        self.log("train/skipped", float(self.skipped), on_step=True)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.ema.to(self.device)

    def on_train_start(self) -> None:
        warn_of_unreached(self.phases, self.optim, self.trainer.estimated_stepping_batches)

    def on_validation_start(self) -> None:
        self.ema.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        save_module_state(self, checkpoint, keep=self._trainer is None or self.trainer.is_global_zero)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        load_module_state(self, checkpoint)

    @property
    def base_fingerprint(self) -> str:
        """SHA-256 of the frozen weights; computed at the first use."""
        if not hasattr(self, "_base_fingerprint"):
            self._base_fingerprint = frozen_fingerprint(self.split_model.transformer)
        return self._base_fingerprint


def as_retrain_blocks(module: LightningModule) -> RetrainBlocks:
    """`module` itself, for callbacks that need retrained blocks.

    Raises:
        ValueError: if it is another kind of module.
    """
    if not isinstance(module, RetrainBlocks):
        raise ValueError(f"got a {type(module).__name__}, expected RetrainBlocks; take this callback out.")
    return module
