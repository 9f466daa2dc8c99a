"""Checks of a whole recipe, before anything is loaded."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule
from lightning.pytorch.strategies import Strategy, StrategyRegistry
from lightning.pytorch.utilities import rank_zero_warn

from data.base_facts import base_family, read_base, vae_normalisation
from data.base_folder import read_class_config, resolve_base
from data.modules.latents import BatchDataModule
from data.modules.shard_module import ShardDataModule
from launch.fit.lightning_private import precision_name
from launch.fit.parser import class_at
from trainer.callbacks.probe_callback import ProbeCallback
from trainer.models.families import family_of
from trainer.models.load import read_config, read_facts
from trainer.module import RetrainBlocks, SurgeryConfig
from trainer.parallel.combinations import check_trainer


def check_combination(config: Any) -> None:
    """Checks that the recipe's strategy, precision and clipping are compatible with the blocks that it retrains.

    Reads only the recipe and creates none of its objects: a strategy may need packages or devices that are not here.

    Args:
        config: the resolved recipe, a namespace with `trainer` and `model`.

    Raises:
        ValueError: if the combination is not supported; names every fault.
    """
    kind, model, trainer = class_at(config.model.class_path), config.model.init_args, config.trainer
    if not issubclass(kind, RetrainBlocks):
        return
    strategy = trainer.get("strategy") or "auto"
    if not isinstance(strategy, str):
        chosen = class_at(strategy.class_path)
    elif strategy in StrategyRegistry:
        chosen = StrategyRegistry[strategy]["strategy"]
    elif strategy == "auto":
        chosen = Strategy
    else:
        raise ValueError(
            f"got trainer.strategy {strategy!r}, expected auto, ddp, another of Lightning's names, or a class as the "
            "overlays in recipes/cluster name it: {class_path: ..., init_args: {...}}."
        )
    check_trainer(
        chosen,
        precision_name(trainer.get("precision")),
        trainer.get("gradient_clip_val"),
        SurgeryConfig(**model.surgery.as_dict()),
        split_trunk=model.split_trunk,
    )


def check_family(base: str, data: BatchDataModule) -> None:
    """Checks that latents are of the base's family: those of several families have the same shape.

    Raises:
        ValueError: if they are not, captions lack the pooled embedding that the base takes, or latents are of another
            VAE.
    """
    config = read_config(base)
    expected, width = family_of(config).family, read_facts(config).pooled_width
    if data.family.title != expected:
        raise ValueError(
            f"got latents of {data.family.title} for a base of {expected}: encode the clips with the base "
            "(`reblock encode --base`)."
        )
    if data.pooled_width != width:
        raise ValueError(
            f"got pooled captions of width {data.pooled_width}, expected {width} as base {base!r} of {expected} takes "
            "them: encode the clips with the base."
        )
    check_normalisation(base, data)


def check_normalisation(base: str, data: BatchDataModule) -> None:
    """Checks that latents are normalised as by the base's VAE, where the base has one: 2B and 5B of CogVideoX differ.

    Raises:
        ValueError: if they are not.
    """
    path = resolve_base(base)
    expected = vae_normalisation(path) if path.is_dir() else None
    if expected is None:
        return
    pairs = [zip(*normalisation, strict=True) for normalisation in (data.normalisation, expected)]
    for channel, (got, own) in enumerate(zip(*pairs, strict=False)):
        if not all(math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9) for a, b in zip(got, own, strict=True)):
            raise ValueError(
                f"got latents of {data.family.title} of another VAE than that of base {base!r}: channel {channel} is "
                f"normalised by {_normalised_by(*got)}, expected {_normalised_by(*own)}. Encode the clips with "
                "the base (`reblock encode --base`)."
            )


def check_encoders(base: str, data: BatchDataModule) -> None:
    """Checks that the base has the text encoders of its family, and warns where the shards were made with other files.

    Raises:
        ValueError: if a text encoder is of another class.
    """
    path = resolve_base(base)
    if not (path / "vae" / "config.json").is_file():
        return
    family = base_family(path)
    for part, kind in family.text_encoders.items():
        if (path / part / "config.json").is_file():
            read_class_config(path / part / "config.json", kind)
    try:
        own = read_base(path).fingerprint
    except ValueError:
        return  # parts that a fit over latents does without are not there
    if data.encoders - {own}:
        rank_zero_warn(
            f"got latents and captions of {family.title} from other encoder files than those of base {base!r}: the "
            "same caption may have another embedding there. Copies of one base in another precision differ too; "
            "otherwise encode the clips with the base (`reblock encode --base`)."
        )


def _normalised_by(mean: float, std: float) -> str:
    return f"mean {mean:g} and deviation {std:g}" + ("" if mean else f" (scaling factor {1 / std:g})")


def check_empty_caption(model: RetrainBlocks, data: BatchDataModule, callbacks: Sequence[Callback]) -> None:
    """Checks that the data hold the encoded empty caption where the run leaves out captions of a family that has one.

    Raises:
        ValueError: if they do not.
    """
    facts = read_facts(read_config(model.base))
    asked = {
        f"model.caption_dropout {model.flow.caption_dropout:g}": model.flow.caption_dropout > 0,
        "unconditional: true": any(c.unconditional for c in callbacks if isinstance(c, ProbeCallback)),
    }
    if facts.empty_caption != "encoded" or not any(asked.values()):
        return
    try:
        data.check_empty_caption()
    except ValueError as error:
        said = " and ".join(option for option, needs in asked.items() if needs)
        raise ValueError(
            f"got {said} with a base of {facts.family}, whose empty caption is what the text encoder makes of an empty "
            f"text: {error} Or set caption_dropout: 0 and unconditional: false."
        ) from error


def check_fit(
    model: LightningModule,
    data: LightningDataModule,
    *,
    ranks: int | None = None,
    callbacks: Sequence[Callback] = (),
) -> None:
    """Checks base, blocks, shards and probes before anything is loaded, and reports all faults in one message.

    Args:
        model: the model of the fit.
        data: the data module of the fit.
        ranks: number of training processes; None if the command does not train.
        callbacks: callbacks of the run.

    Raises:
        ValueError: if anything is wrong; names every fault.
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
    if not faults and isinstance(data, ShardDataModule) and ranks is not None:
        attempt(lambda: data.check_batches(ranks))
    if not faults and isinstance(data, BatchDataModule):
        for probes in {callback.prompts for callback in callbacks if isinstance(callback, ProbeCallback)}:
            attempt(partial(data.check_probes, probes))
        if isinstance(model, RetrainBlocks):
            attempt(partial(check_family, model.base, data))
            attempt(partial(check_encoders, model.base, data))
            attempt(partial(check_empty_caption, model, data, callbacks))
            for shape in data.latent_shapes.values():
                attempt(partial(model.check_data, shape, data.text_width))
    if faults:
        raise ValueError("\n".join(faults))
