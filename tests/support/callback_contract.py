"""Every callback of the tree in a short fit: found by walking the packages, made with small settings, watched.

Run as a script, one of two ranks: `callback_contract.py FOLDER BASE` makes a fit without callbacks and one with all of
them, and writes what both ranks saw to FOLDER/rank-N.json.
"""

import importlib
import inspect
import json
import pkgutil
import random
import signal
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import LightningArgumentParser

import launch.fit
import trainer as trainer_package
from launch.fit.last_checkpoint import LastCheckpoint
from launch.fit.metrics_csv import MetricsFile
from launch.run_folder import RunFolder
from tests.support.measured_fits import Clips, make_module, make_trainer
from trainer.callbacks.sinks import SinkFrequency
from trainer.checkpoint.io import BackgroundCheckpointIO
from trainer.surgery import fingerprint

#: Packages whose callbacks keep the contract.
PACKAGES = (trainer_package, launch.fit)

SMALL: dict[str, Any] = {"prompts": 2, "sigmas": (0.5,)}


def _saved_config(kind: type[Callback]) -> Callback:
    parser = LightningArgumentParser()
    return kind(parser, parser.parse_args([]))  # type: ignore[call-arg]


#: How a callback that needs arguments is made, by class name: (class, run folder) -> it and what it works with.
MAKE: dict[str, Callable[[Any, RunFolder], list[Callback]]] = {
    "SinkFrequency": lambda kind, run: [kind(**SMALL)],
    "MassiveActivations": lambda kind, run: [kind(**SMALL)],
    "MaskingRobustness": lambda kind, run: [kind(ratios=(0.5,), scopes=("retrained", "all"), **SMALL)],
    "TrunkCache": lambda kind, run: [kind(), SinkFrequency(layers="all", **SMALL)],
    "LastCheckpoint": lambda kind, run: [kind(run.last_checkpoint, 1)],
    "BestCheckpoints": lambda kind, run: [kind(dirpath=run.checkpoints, filename="best-{step}", monitor="val/loss")],
    "StopOnSignal": lambda kind, run: [last := LastCheckpoint(run.last_checkpoint, 1), kind(last)],
    "Watchdog": lambda kind, run: [kind(run, 3600.0)],
    "RankConsistency": lambda kind, run: [kind(lambda: {"recipe": "the same"})],
    "SaveRecipe": lambda kind, run: [_saved_config(kind)],
}


def callback_classes() -> dict[str, type[Callback]]:
    """Name -> every callback that can be used: bases are tested by their subclasses."""
    found: dict[str, type[Callback]] = {}
    for package in PACKAGES:
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            module = importlib.import_module(info.name)
            for name, kind in inspect.getmembers(module, inspect.isclass):
                if issubclass(kind, Callback) and kind.__module__ == info.name and not inspect.isabstract(kind):
                    assert found.setdefault(name, kind) is kind, f"two callbacks have the name {name}"
    bases = {base for kind in found.values() for base in kind.__mro__[1:]}
    return {name: kind for name, kind in found.items() if kind not in bases}


def make(kind: type[Callback], folder: Path) -> list[Callback]:
    """A callback and what it works with; one with arguments of its own needs an entry in `MAKE`."""
    run = RunFolder(folder)
    return MAKE[kind.__name__](kind, run) if kind.__name__ in MAKE else [kind()]


def make_all(folder: Path) -> list[Callback]:
    """One of each callback, as a recipe would list them: one cache and one file of the last checkpoint for all."""
    found: list[Callback] = []
    for kind in callback_classes().values():
        for callback in make(kind, folder):
            if not any(type(other) is type(callback) for other in found):
                found.append(callback)
    for callback in found:
        if hasattr(callback, "last_checkpoint"):
            callback.last_checkpoint = next(one for one in found if isinstance(one, LastCheckpoint))
    return found


def _digest(*values: Any) -> str:
    return sha256(repr(values).encode()).hexdigest()[:16]


def random_digest() -> str:
    """Of the states of all generators of this process."""
    return _digest(torch.get_rng_state().tolist(), random.getstate(), np.random.get_state(legacy=False))  # noqa: NPY002


def weights_digest(module: LightningModule) -> str:
    """Of all parameters, buffers and averages, frozen ones too."""
    averages = {f"ema.{name}": value for name, value in module.ema.average.items()}
    return fingerprint([*module.named_parameters(), *module.named_buffers(), *averages.items()])


def state_of(module: LightningModule) -> dict[str, Any]:
    """What a callback must leave as it was, besides the weights."""
    parts = list(module.modules())
    return {
        "modes": _digest([part.training for part in parts]),
        "hooks": [
            (type(part).__name__, name, len(hooks))
            for part in parts
            for name, hooks in vars(part).items()
            if "_hooks" in name and isinstance(hooks, dict) and hooks
        ],
        "tensor hooks": [name for name, p in module.named_parameters() if p._backward_hooks],
        "attention": [processor.attend.__qualname__ for processor in module.split_model._processors.values()],
        "trainable": [name for name, p in module.named_parameters() if p.requires_grad],
        "autograd": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), str(torch.get_default_dtype())),
    }


class Watch(Callback):
    """Keeps what every step sees: random state, modes, hooks, gradients, losses, weights."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(("start", batch.keys, random_digest(), state_of(pl_module)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [(name, p.grad) for name, p in pl_module.named_parameters() if p.grad is not None]
        self.seen.append(("gradients", fingerprint(gradients)))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(("end", outputs["loss"].item().hex(), weights_digest(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.seen.append(("validation", batch.keys, random_digest(), state_of(pl_module), weights_digest(pl_module)))

    def on_train_end(self, trainer, pl_module):
        losses = {name: float(value).hex() for name, value in trainer.callback_metrics.items() if "loss" in name}
        self.seen.append(("over", losses, random_digest(), state_of(pl_module), weights_digest(pl_module)))


class Fault(Callback):
    """Raises in the second epoch."""

    def __init__(self, where: str) -> None:
        self.where = where

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.where == "training" and trainer.current_epoch == 1:
            raise KeyError("a fault in training")

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if self.where == "validation" and trainer.current_epoch == 1:
            raise KeyError("a fault in validation")


def watched_fit(folder: Path, base: Path, callbacks: list[Callback], fault: str = "", **options: Any) -> dict[str, Any]:
    """What a fit of two epochs of two steps saw, and what is left after it."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- callbacks must leave the global generator alone
    watch, module = Watch(), make_module(base)
    trainer: Trainer = make_trainer(
        folder, [watch, *callbacks, *([Fault(fault)] if fault else [])],
        **{"logger": MetricsFile(RunFolder(folder)), "plugins": [BackgroundCheckpointIO()], "log_every_n_steps": 1,
           "num_sanity_val_steps": 0, "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
           "limit_train_batches": 2, "limit_val_batches": 1} | options,
    )  # fmt: skip
    raised = ""
    try:
        trainer.fit(module, datamodule=Clips())
    except KeyError as error:
        raised = str(error)
        for callback in callbacks:  # Lightning calls it after a fit that ends by itself only
            callback.teardown(trainer, module, "fit")
    return {
        "raised": raised, "steps": watch.seen, "random": random_digest(), "state": state_of(module),
        "weights": weights_digest(module),
        "signals": [str(signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)],
    }  # fmt: skip


def main(folder: Path, base: Path) -> None:
    torch.set_num_threads(1)
    ranks = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": True}
    without = watched_fit(folder / "without", base, [], **ranks)
    callbacks = make_all(folder / "with")
    found = watched_fit(folder / "with", base, callbacks, **ranks)
    rank = torch.distributed.get_rank()
    torch.distributed.destroy_process_group()
    names = [type(callback).__name__ for callback in callbacks]
    (folder / f"rank-{rank}.json").write_text(json.dumps({"without": without, "with": found, "callbacks": names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
