"""Callbacks for recipes of tests: a rank sends itself a real signal at a given place of a fit."""

import os
import signal

from lightning.pytorch import Callback

from tests.support.undrawn import SinkFrequency


def send(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])


class SignalInValidation(Callback):
    """In the first validation batch of an epoch."""

    def __init__(self, epoch: int, rank: int, name: str = "SIGUSR1") -> None:
        self.epoch, self.rank, self.name = epoch, rank, name

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if (trainer.current_epoch, trainer.global_rank, batch_idx) == (self.epoch, self.rank, 0):
            send(self.name)


class SignalAtStep(Callback):
    """While the optimiser step with this number, counted from 0, is taken."""

    def __init__(self, step: int, rank: int, name: str = "SIGUSR1") -> None:
        self.step, self.rank, self.name = step, rank, name

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            send(self.name)


class SignalInMeasurement(SinkFrequency):
    """In the first measured batch after an epoch."""

    def __init__(self, *, signal_epoch: int, signal_rank: int, **settings) -> None:
        super().__init__(**settings)
        self.when = (signal_epoch, signal_rank)

    def observe(self, module, probes):
        trainer = module.trainer
        if trainer.global_step and (trainer.current_epoch, trainer.global_rank) == self.when:
            send("SIGUSR1")
        return super().observe(module, probes)
