"""A fit that notes which samples each step saw."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from data.modules.latents import LatentDataModule

BATCHES, EPOCHS = 7, 3


class Recorder(LightningModule):
    """Notes which samples each step saw, and draws from the global generator as dropout would."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.steps = []

    def training_step(self, batch, batch_idx):
        self.steps.append((self.current_epoch, batch_idx, batch.uids))
        return (self.weight - batch.latents.mean()).square().sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(shards, *, workers=0, checkpoint=None, callbacks=(), data=None, module=None, **trainer):
    settings = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "reload_dataloaders_every_n_epochs": 1, "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks), "max_epochs": EPOCHS,
    }  # fmt: skip
    module = module or Recorder()
    data = data or LatentDataModule(shards=shards, val_samples=4, batch_size=4, num_workers=workers, passes=1)
    Trainer(**{**settings, **trainer}, callbacks=list(callbacks)).fit(module, data, ckpt_path=checkpoint)
    return module.steps


def every_step(folder):
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
