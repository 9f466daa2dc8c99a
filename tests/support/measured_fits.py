"""Fits with measurements: a tiny data module with held-out samples, the callbacks, the Trainer."""

import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch.utils.data import DataLoader

from data.batch import Batch, Sample
from tests.support import undrawn
from trainer.callbacks.masking import MaskingRobustness
from trainer.callbacks.sinks import SinkFrequency
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig


class Clips(LightningDataModule):
    """Random samples with captions of three lengths; the first 8 train, the rest are held out."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.samples = [
            Sample(
                latent=torch.randn(4, 2, 4, 6, generator=generator),
                text=torch.randn(2 + i % 3, 16, generator=generator),
                key=f"clip-{i}",
                uid=i,
            )
            for i in range(12)
        ]

    def _loader(self, samples):
        return DataLoader(samples, batch_size=2, collate_fn=Batch.collate)

    def train_dataloader(self):
        return self._loader(self.samples[:8])

    def val_dataloader(self):
        return self._loader(self.samples[8:])

    def probe_samples(self, count):
        torch.rand(1)  # a source that draws random numbers must not change training either
        return self.samples[8 : 8 + count]


def make_module(base, **kwargs):
    surgery = SurgeryConfig(last=2, init=kwargs.pop("init", "dit"))
    return RetrainBlocks(base=str(base), surgery=surgery, optim=OptimConfig(lr=1e-2, warmup_steps=1), **kwargs)


def measurements(*, drawn=False, **kwargs):
    kwargs = {"prompts": 3, "sigmas": (0.3, 0.7)} | kwargs
    sinks, masking = (SinkFrequency, MaskingRobustness) if drawn else (undrawn.SinkFrequency, undrawn.MaskingRobustness)
    return [sinks(**kwargs), masking(ratios=(0.5, 0.9), **kwargs)]


def make_trainer(root, callbacks, logger=False, **kwargs):
    return Trainer(
        **{"default_root_dir": root, "max_epochs": 2, "accelerator": "cpu", "devices": 1, "logger": logger}
        | {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        | {"callbacks": callbacks}
        | kwargs
    )


def fit(root, base, callbacks, **kwargs):
    torch.manual_seed(0)
    trainer, module = make_trainer(root, callbacks, **kwargs), make_module(base)
    trainer.fit(module, datamodule=Clips())
    return module


def files(root, folder):
    return sorted(path.name for path in (root / folder).iterdir())
