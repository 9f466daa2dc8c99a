"""The LightningModule: one training step, the optimiser, what a checkpoint holds.

Legend: B batch, C channels, F latent frames, H W latent grid.
"""

import contextlib
import logging
import math
from collections.abc import Iterator

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from data.batch import Batch
from trainer import surgery as operate
from trainer.compile import CompiledPart, compile_blocks
from trainer.ema import Ema, check_decay, holding
from trainer.graft import base_block_weights
from trainer.models.from_scratch import fresh_frequencies, reserve_channels
from trainer.models.load import check_base, load_transformer, read_config
from trainer.models.mochi import SplitModel, State
from trainer.objective import Flow, SigmaSampler
from trainer.optimizer import OptimConfig, adamw, clip_or_drop, linear_warmup
from trainer.parallel.combinations import check_shards, check_trainer
from trainer.parallel.sharded_tensors import full_tensor, gather_full
from trainer.parallel.strategies import build_device, distribute
from trainer.surgery import SurgeryConfig as SurgeryConfig

log = logging.getLogger(__name__)

#: Edges of the sigma bands that the loss is reported in.
SIGMA_BANDS = (0.0, 0.25, 0.5, 0.75, 1.0)

#: What a checkpoint's `state_dict` puts before the name in the diffusers transformer, and what this module does. The
#: file format keeps its names whatever the attributes are called.
_IN_FILE, _IN_MODULE = "room.model.", "split_model.transformer."


class _RestoreLiveWeights(Callback):
    """If validation raises, puts the live weights back: a checkpoint written then must not hold averages as them."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, RetrainBlocks):
            pl_module.end_evaluation()


class RetrainBlocks(LightningModule):
    """Retrains re-initialised blocks of a frozen Mochi.

    Args:
        base: diffusers folder, transformer folder, hub id, or a `config.json` (random weights).
        surgery: which blocks, and how they start.
        optim: optimiser and schedule.
        sigma: distribution of sigma.
        caption_dropout: share of samples trained without caption.
        seed: of sigma, noise and caption dropout.
        ema_decay: decay of the average used for validation and export.
        trunk_dtype: dtype of the frozen trunk's weights; `bfloat16` halves their memory.
        checkpoint_head: recompute activations of head blocks in the backward pass.
        compile: blocks that training steps run through torch.compile: `none`, `trunk`, `head` or `both`.
        stock_attention: run diffusers' own attention processor (for comparisons only).
        split_trunk: run the trunk apart, under no_grad. Off only for the benchmark's comparison.
        val_sigmas: sigmas at which validation loss is measured.
    """

    def __init__(
        self,
        *,
        base: str,
        surgery: SurgeryConfig,
        optim: OptimConfig | None = None,
        sigma: SigmaSampler = "uniform",
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
        self.base = base
        self.surgery = surgery
        self.optim = optim or OptimConfig()
        self.flow = Flow(sigma=sigma, caption_dropout=caption_dropout, seed=seed)
        self.ema_decay = ema_decay
        self.trunk_dtype = getattr(torch, trunk_dtype)
        self.checkpoint_head = checkpoint_head
        self.compile_part = compile
        self.stock_attention = stock_attention
        self.split_trunk = split_trunk
        self.val_sigmas = val_sigmas
        self.split_model: SplitModel | None = None
        self.ema: Ema | None = None
        self._evaluation = contextlib.ExitStack()  # holds the averages in place while validation lasts
        self.skipped = 0
        self.skipped_in_row = 0
        self.strict_loading = False  # a checkpoint holds no frozen weight

    # -- building ------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Faults of base and block choice, before anything is loaded.

        Raises:
            ValueError: with what was got and expected.
        """
        config = check_base(self.base)
        self._choose(config["num_layers"])

    def check_data(self, latent_shape: tuple[int, ...], text_width: int) -> None:
        """Whether shards of (C, F, H, W) latents and captions of `text_width` fit the base.

        Raises:
            ValueError: if they do not.
        """
        check_shards(self.base, latent_shape, text_width)

    def check_trainer(self, trainer: Trainer) -> None:
        """Faults of the Trainer's strategy, precision and clipping with this model.

        Raises:
            ValueError: naming all of them.
        """
        clip, precision = trainer.gradient_clip_val, str(trainer.precision)
        check_trainer(type(trainer.strategy), precision, clip, self.surgery, split_trunk=self.split_trunk)

    def _choose(self, num_blocks: int) -> tuple[int, ...]:
        return operate.choose_blocks(num_blocks, last=self.surgery.last, blocks=self.surgery.blocks)

    def configure_model(self) -> None:
        if self._trainer is None:
            return self.build("cpu") if self.split_model is None else None
        strategy = self.trainer.strategy
        self.check_trainer(self.trainer)
        if self.split_model is None:
            self.build(build_device(strategy, self.base))
        distribute(self, strategy)

    def build(self, device: torch.device | str) -> None:
        """Loads the base onto `device` and operates on it: re-initialise, freeze, average."""
        self.blocks = self._choose(read_config(self.base)["num_layers"])
        model = load_transformer(
            self.base, device=device, dtype=self.trunk_dtype, seed=self.surgery.seed, float32_from=self.first
        )
        model.train()  # as Lightning expects a module under training; Mochi has no dropout
        self.split_model = SplitModel(
            model, stock_attention=self.stock_attention, checkpoint_blocks=self.checkpoint_head
        )
        retrained = [model.transformer_blocks[i] for i in self.blocks]
        for index, block in zip(self.blocks, retrained, strict=True):
            if torch.device(device).type != "meta":
                operate.reinitialise(block, self.surgery.init, self.surgery.seed * 1000 + index)
        operate.freeze_all_but(model, [model] if self.surgery.train_outside else retrained)
        model.pos_frequencies.requires_grad_(False)
        if self.surgery.train_outside and torch.device(device).type != "meta":
            fresh_frequencies(model, self.surgery.seed)
        if self.surgery.reserved_channels:
            reserve_channels(model, self.surgery.reserved_channels)
        wanted = {"trunk": range(self.first), "head": range(self.first, self.split_model.num_blocks)}
        compile_blocks(
            model.transformer_blocks[i]
            for part, indices in wanted.items()
            if self.compile_part in (part, "both")
            for i in indices
        )
        self.ema = Ema(self.retrained_parameters(), decay=self.ema_decay)

    @property
    def first(self) -> int:
        """The first retrained block: where the trunk ends and the head begins."""
        return 0 if self.surgery.train_outside else self.blocks[0]

    def retrained_parameters(self) -> dict[str, Tensor]:
        """Trained parameters by their name in the diffusers transformer."""
        return {name: p for name, p in self.split_model.transformer.named_parameters() if p.requires_grad}

    # -- one step ------------------------------------------------------------------------------------------------

    def trunk(self, x: Tensor, sigma: Tensor, batch: Batch) -> State:
        """Everything before the first retrained block, without autograd."""
        trains = self.surgery.train_outside or not self.split_trunk
        narrow = self.trunk_dtype != torch.float32
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            with torch.autocast(x.device.type, self.trunk_dtype) if narrow else contextlib.nullcontext():
                state = self.split_model.embed(
                    x, self.flow.timestep(sigma), batch.text, batch.text_mask, batch.text_lengths
                )
                state = self.split_model.run(state, 0, self.first)
        # What the trunk computed in a narrow dtype goes on in the head's.
        return state if trains else state.map(lambda t: t.to(x.dtype) if t.is_floating_point() else t)

    def head(self, state: State) -> Tensor:
        """From the first retrained block to the velocity."""
        return self.split_model.finish(self.split_model.run(state, self.first, self.split_model.num_blocks))

    def velocity(self, x: Tensor, sigma: Tensor, batch: Batch) -> Tensor:
        """Predicted velocity at x_sigma, (B, C, F, H, W)."""
        return self.head(self.trunk(x, sigma, batch))

    def losses(self, batch: Batch, noise: Tensor, sigma: Tensor) -> Tensor:
        """Mean squared error per sample, (B,) float32."""
        x = self.flow.mix(batch.latents, noise, sigma)
        error = self.velocity(x, sigma, batch).float() - self.flow.target(batch.latents, noise)
        return error.square().flatten(1).mean(dim=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        epoch, device = self.current_epoch, batch.latents.device
        host_sigma = self.flow.sigma(epoch, batch.uids)
        noise = self.flow.noise(epoch, batch.uids, batch.latents.shape[1:]).to(device, non_blocking=True)
        batch = batch.without_captions(self.flow.dropped(epoch, batch.uids))
        losses = self.losses(batch, noise, host_sigma.to(device, non_blocking=True))
        loss = losses.mean()
        self._log_losses(losses.detach(), host_sigma)
        # A non-finite loss must give non-finite gradients on every rank, so that all skip the step together.
        return loss * (loss - loss + 1).detach()

    def _log_losses(self, losses: Tensor, sigma: Tensor) -> None:
        self.log("train/loss", losses.mean(), on_step=True, prog_bar=True, batch_size=len(losses))
        for low, high in zip(SIGMA_BANDS[:-1], SIGMA_BANDS[1:], strict=True):
            inside = ((sigma >= low) & (sigma < high)).nonzero().flatten()  # sigma is on the host: no wait
            # Lightning would log a band without samples again with its last value: nan says that there is none.
            value = losses[inside.to(losses.device)].mean() if len(inside) else math.nan
            self.log(f"train/loss_sigma_{low:.2f}-{high:.2f}", value, on_step=True)

    # -- validation ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # Samples that come again only to give all ranks as many do not count.
        counts = torch.tensor(batch.counts, device=batch.latents.device)
        rows = sum(batch.counts)
        shape = batch.latents.shape[1:]
        noise = self.flow.noise(0, batch.uids, shape).to(batch.latents.device)
        for value in self.val_sigmas:
            sigma = torch.full((len(batch),), value, device=noise.device)
            losses = self.losses(batch, noise, sigma)
            loss = losses[counts].mean() if rows else torch.zeros_like(losses[0])
            self.log(f"val/loss_sigma_{value:.3f}", loss, batch_size=rows, sync_dist=True)
            self.log("val/loss", loss, prog_bar=True, batch_size=rows, sync_dist=True)

    def on_validation_epoch_start(self) -> None:
        self._evaluation.enter_context(self.evaluation_weights())

    def on_validation_epoch_end(self) -> None:
        self.end_evaluation()

    def end_evaluation(self) -> None:
        """The retrained blocks hold their live weights again, if validation had averages in their place."""
        self._evaluation.close()

    def configure_callbacks(self) -> list[Callback]:
        return [_RestoreLiveWeights()]

    def evaluation_weights(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the retrained blocks hold their EMA weights."""
        return self.ema.swapped_in()

    @contextlib.contextmanager
    def base_weights(self) -> Iterator[None]:
        """Inside, the retrained blocks hold the base's own weights, read anew from its files."""
        live = self.retrained_parameters()
        own = base_block_weights(self.base, live, seed=self.surgery.seed, dtype=self.trunk_dtype, device=self.device)
        with holding(live, own):
            yield

    # -- optimisation --------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = adamw(self.retrained_parameters(), self.optim, fused=self.device.type == "cuda")
        schedule = linear_warmup(optimizer, self.optim.warmup_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None) -> None:
        """Clips, or drops every gradient of a non-finite step: AdamW leaves a parameter without gradient alone."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
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
        self.log("train/lr", optimizer.param_groups[0]["lr"], on_step=True)
        self.log("train/skipped", float(self.skipped), on_step=True)

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.ema.to(self.device)

    def on_validation_start(self) -> None:
        self.ema.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        # Whole tensors on the first rank, whatever the strategy: any other resumes from them.
        keep = self._trainer is None or self.trainer.is_global_zero
        trained = {_IN_FILE + name: p for name, p in self.retrained_parameters().items()}
        checkpoint["state_dict"] = gather_full(trained, keep=keep)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = gather_full(checkpoint["optimizer_states"], keep=keep)
        checkpoint["reblock"] = {
            "blocks": list(self.blocks),
            "base_fingerprint": self.base_fingerprint,
            "ema": gather_full(self.ema.state_dict(), keep=keep),
            "skipped": [self.skipped, self.skipped_in_row],
        }

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        saved = checkpoint.get("reblock")
        if saved is None:
            raise ValueError("the checkpoint was not written by Reblock; expected one from this run's checkpoints/.")
        if tuple(saved["blocks"]) != self.blocks:
            raise ValueError(
                f"the checkpoint retrains blocks {saved['blocks']}, this run blocks {list(self.blocks)}; "
                "resume with the recipe that wrote it, or start a run of another name."
            )
        if saved["base_fingerprint"] != self.base_fingerprint:
            raise ValueError(
                f"the checkpoint belongs to a base with fingerprint {saved['base_fingerprint'][:16]}..., this run's "
                f"base {self.base} has {self.base_fingerprint[:16]}...; point `model.base` at its own base."
            )
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {_IN_MODULE + name.removeprefix(_IN_FILE): value for name, value in weights.items()}
        self.ema.load_state_dict(saved["ema"])
        self.skipped, self.skipped_in_row = saved["skipped"]

    @property
    def base_fingerprint(self) -> str:
        """SHA-256 of the frozen weights, taken once when first asked for."""
        if not hasattr(self, "_base_fingerprint"):
            self._base_fingerprint = operate.frozen_fingerprint(self.split_model.transformer)
        return self._base_fingerprint


def as_retrain_blocks(module: LightningModule) -> RetrainBlocks:
    """`module` itself, for callbacks that need retrained blocks.

    Raises:
        ValueError: if it is another kind of module.
    """
    if not isinstance(module, RetrainBlocks):
        raise ValueError(f"got a {type(module).__name__}, expected RetrainBlocks; take this callback out.")
    return module
