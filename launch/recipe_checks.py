"""What can be wrong with a recipe's objects together, before anything is loaded."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer

from data.datamodule import LatentSource, ShardDataModule
from trainer.callbacks.stages import ProbeCallback
from trainer.module import RetrainBlocks


def check_fit(
    model: LightningModule,
    data: LightningDataModule,
    *,
    ranks: int | None = None,
    callbacks: Sequence[Callback] = (),
    trainer: Trainer | None = None,
) -> None:
    """Everything about base, blocks, shards and probes that can be wrong, in one message, before anything is loaded.

    Args:
        model: that is fitted.
        data: that it is fitted on.
        ranks: processes that train together; None does not train.
        callbacks: of the run.
        trainer: whose strategy, precision and clipping are checked.

    Raises:
        ValueError: naming every fault.
    """
    faults: list[str] = []

    def attempt(check: Callable[[], Any]) -> None:
        try:
            check()
        except ValueError as error:
            if str(error) not in faults:
                faults.append(str(error))

    for part in (model, data):
        attempt(getattr(part, "check", lambda: None))
    if trainer is not None and isinstance(model, RetrainBlocks):
        attempt(partial(model.check_trainer, trainer))
    if not faults and isinstance(data, ShardDataModule) and ranks is not None:
        attempt(lambda: data.check_batches(ranks))
    if not faults and isinstance(data, LatentSource):
        for probes in {callback.prompts for callback in callbacks if isinstance(callback, ProbeCallback)}:
            attempt(partial(data.check_probes, probes))
        if isinstance(model, RetrainBlocks):
            for shape in data.latent_shapes.values():
                attempt(partial(model.check_data, shape, data.text_width))
    if faults:
        raise ValueError("\n".join(faults))
