"""Trains a small `AutoencoderKLMochi` from scratch for the demo's base, since none of this size is published.

Legend: B batch, T frames, C latent channels.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLMochi
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor


class TrainVae(LightningModule):
    """Trains a VAE on reconstruction (mean absolute and squared error) with a small KL term.

    Args:
        config: JSON file with the VAE's diffusers config.
        lr: AdamW's learning rate after warmup; it falls linearly to a tenth of that at the last step.
        warmup_steps: number of linear warmup steps.
        kl_weight: weight of the KL divergence per latent element, relative to the error per pixel.
        channels_last: whether to store activations channels-last, which speeds up 16-bit convolutions on a GPU.
        seed: seed of the initial weights.
    """

    def __init__(
        self,
        *,
        config: str,
        lr: float = 2e-3,
        warmup_steps: int = 100,
        kl_weight: float = 1e-4,
        channels_last: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.config_file = config
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.kl_weight = kl_weight
        torch.manual_seed(seed)
        self.vae = AutoencoderKLMochi.from_config(json.loads(Path(config).read_text()))
        if channels_last:
            self.vae.to(memory_format=torch.channels_last_3d)

    def _losses(self, video: Tensor, *, sample: bool) -> tuple[Tensor, Tensor, Tensor]:
        posterior = self.vae.encode(video).latent_dist
        latent = posterior.sample() if sample else posterior.mode()
        error = self.vae.decode(latent).sample.float() - video
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return error.square().mean(), error.abs().mean(), kl

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        squared, absolute, kl = self._losses(batch["video"], sample=True)
        self.log_dict({"train/mse": squared, "train/kl": kl}, prog_bar=True, on_step=True)
        return squared + absolute + self.kl_weight * kl

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        squared, _, kl = self._losses(batch["video"], sample=False)
        # Pixels are in [-1, 1], so the peak of the PSNR is 2.
        self.log_dict({"val/loss": squared, "val/psnr": 10 * torch.log10(4 / squared), "val/kl": kl}, prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.0)
        total = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=self.warmup_steps),
                torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=max(1, total - self.warmup_steps)),
            ],
            milestones=[self.warmup_steps],
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Measures mean and standard deviation of the latents for the VAE's config, and saves the VAE in float16."""
        self.vae.eval()
        latents = []
        data: LightningDataModule = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it late
        for batch in data.val_dataloader():
            video = batch["video"].to(self.device)
            latents.append(self.vae.encode(video).latent_dist.mean.float().transpose(0, 1).flatten(1).cpu())
        flat = torch.cat(latents, dim=1)  # (C, all latent positions)
        statistics: dict[str, Any] = {
            "latents_mean": flat.mean(dim=1).tolist(),
            "latents_std": flat.std(dim=1).tolist(),
            "scaling_factor": 1.0,
        }
        self.vae.register_to_config(**statistics)
        self.vae.half().save_pretrained(Path(self.trainer.default_root_dir) / "vae", safe_serialization=True)
