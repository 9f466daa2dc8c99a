"""Reads a plan's inputs from a recipe, with the parser of `fit` but without a Trainer, device or weights."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from data.base_folder import resolve_base
from data.bucket import Bucket
from data.families import family_titled
from data.modules.latents import BatchDataModule
from data.modules.shard_module import ShardDataModule
from data.storage.store import StoreError
from launch.fit.checks import check_combination
from launch.fit.cli import ReadingCLI, recipe_cli
from launch.plan.hardware import Hardware
from launch.plan.sharding import Sharding, read_sharding
from trainer.models.load import read_config, read_facts
from trainer.module import RetrainBlocks

#: Configs of the published bases, whose hub ids they say: a plan needs no download of these.
_PUBLISHED = Path(__file__).resolve().parents[2] / "recipes" / "transformers"

#: Lightning's name of a precision -> dtype of autocast.
_PRECISIONS = {"32": None, "32-true": None, "bf16-mixed": torch.bfloat16}


class PlanCLI(ReadingCLI):
    """Reads a recipe and the plan's own options; creates model, data module and callbacks, but no Trainer."""

    def init_parser(self, **kwargs: Any) -> Any:
        return super().init_parser(**{**kwargs, "prog": "reblock plan"})

    def add_arguments_to_parser(self, parser: Any) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--nodes", type=int | None, default=None, help="nodes; default: the recipe's")
        parser.add_argument("--frames", type=int | None, default=None, help="of a clip, where the shards are not here")
        parser.add_argument("--height", type=int | None, default=None, help="of a clip in pixels")
        parser.add_argument("--width", type=int | None, default=None, help="of a clip in pixels")
        parser.add_argument("--text_tokens", type=int | None, default=None, help="of a caption; default: the longest")
        parser.add_argument("--json", type=Path | None, default=None, help="also write all figures to this file")
        parser.add_class_arguments(Hardware, "hardware")

    def instantiate_classes(self) -> None:
        config = self.config.clone()
        # These parts of a Trainer need devices; callbacks do not.
        for part in ("strategy", "plugins", "logger", "profiler"):
            config.trainer[part] = None
        self.config_init = self.parser.instantiate_classes(config)
        self.datamodule, self.model = self.config_init.data, self.config_init.model

    @property
    def callbacks(self) -> list[Callback]:
        """The callbacks of the recipe."""
        return list(self.config_init.trainer.callbacks or [])


@dataclass(kw_only=True)
class PlanInputs:
    """Inputs of a plan for one training run.

    Args:
        module: module that is not built yet; its base is a config.json.
        base: name of the base in the recipe.
        sharding: sharding of the recipe's strategy.
        gpu: whether the recipe runs on GPUs.
        nodes: number of nodes.
        per_node: ranks per node.
        node_size: GPUs per node for weak scaling: `per_node`, or the assumed number if the recipe gives none.
        batch: samples per rank and micro-batch.
        val_batch: validation samples per rank.
        accumulate: micro-batches per optimiser step.
        autocast: dtype of matrix products under autocast; None without autocast.
        latent: (C, F, H, W) of the largest latent.
        latent_from: source of the latent's size.
        text_tokens: number of tokens of a caption.
        text_width: width of the caption embeddings.
        pooled_width: width of the pooled caption embeddings; None for a family without.
        callbacks: callbacks of the recipe.
        hardware: the assumed hardware.
        json: JSON file to write all figures to; None writes none.
        refused: why `fit` refuses the recipe; None if it does not.
    """

    module: RetrainBlocks
    base: str
    sharding: Sharding
    gpu: bool
    nodes: int
    per_node: int
    node_size: int
    batch: int
    val_batch: int
    accumulate: int
    autocast: torch.dtype | None
    latent: tuple[int, int, int, int]
    latent_from: str
    text_tokens: int
    text_width: int
    pooled_width: int | None
    callbacks: list[Callback] = field(default_factory=list)
    hardware: Hardware = field(default_factory=Hardware)
    json: Path | None = None
    refused: str | None = None

    @property
    def ranks(self) -> int:
        """Number of training processes, one per device."""
        return self.nodes * self.per_node


def read_inputs(args: list[str], nodes: int | None = None) -> PlanInputs:
    """Reads the inputs of a plan.

    Args:
        args: options of `reblock fit` and of `reblock plan`.
        nodes: number of nodes; None takes `--nodes`, or else the recipe's.

    Raises:
        ValueError: if recipe, base, sizes or layout are invalid; names every fault.
    """
    cli = recipe_cli(args, run=False, kind=PlanCLI)
    assert isinstance(cli, PlanCLI)
    config, module, data = cli.config_init, cli.model, cli.datamodule
    if not isinstance(module, RetrainBlocks):
        raise ValueError(
            f"got a recipe for {type(module).__name__}, expected trainer.module.RetrainBlocks: nothing else is planned."
        )
    faults: list[str] = []

    def attempt(read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (ValueError, StoreError) as error:
            faults.append(str(error))

    hardware: Hardware = config.hardware
    given = nodes if nodes is not None else config.nodes
    nodes = int(config.trainer.num_nodes) if given is None else given
    if nodes < 1:
        faults.append(f"got nodes {nodes}, expected at least 1; set --nodes.")
    gpu = config.trainer.accelerator in ("auto", "gpu", "cuda")
    per_node = attempt(lambda: _per_node(config.trainer.devices, gpu, hardware)) or 0
    ranks = max(0, nodes) * per_node  # 0 if invalid, to skip the checks that depend on it
    said = nodes > 1 or config.trainer.devices not in ("auto", -1, "-1")
    base, autocast = module.base, attempt(lambda: _autocast(config.trainer.precision))
    sharding = attempt(lambda: read_sharding(cli.config.trainer.strategy, ranks))
    batch = attempt(lambda: _batch(data, ranks)) if ranks else 0
    file = attempt(lambda: base_config(base))
    size = None
    if file is not None:
        module.base = str(file)
        attempt(lambda: module.retrained_blocks(read_facts(read_config(module.base)).num_blocks))
        size = attempt(lambda: _size(config, data, module))
    if faults or size is None:
        raise ValueError("\n".join(faults))
    return PlanInputs(
        module=module, base=base, sharding=sharding, gpu=gpu, nodes=nodes, per_node=per_node,
        node_size=per_node if said else hardware.gpus_per_node, batch=batch, val_batch=data.config.val_batch_size,
        accumulate=int(config.trainer.accumulate_grad_batches or 1), autocast=autocast,
        callbacks=cli.callbacks, hardware=hardware, json=config.json, refused=_refusal(cli.config), **size,
    )  # fmt: skip


def _refusal(config: Any) -> str | None:
    try:
        check_combination(config)
    except ValueError as error:
        return str(error)
    return None


def base_config(base: str) -> Path:
    """Path of the config.json of a base; the weights may be absent.

    Raises:
        ValueError: if there is no valid config.
    """
    try:
        path = resolve_base(base)
    except ValueError as error:
        for config in sorted(_PUBLISHED.glob("*.json")):
            if json.loads(config.read_text()).get("_name_or_path") == base:
                return config
        raise ValueError(f"{error} A plan needs its transformer/config.json only: --model.base FILE.") from error
    read_config(base)  # raises if the config is invalid
    if path.is_file():
        return path
    inside = path / "transformer" / "config.json"
    return inside if inside.is_file() else path / "config.json"


def _per_node(devices: Any, gpu: bool, hardware: Hardware) -> int:
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if devices in ("auto", -1):
        return hardware.gpus_per_node if gpu else 1
    if isinstance(devices, int) and devices > 0:
        return devices
    found = [part for part in (devices.split(",") if isinstance(devices, str) else devices or []) if str(part).strip()]
    if not found:
        raise ValueError(f"got trainer.devices {devices!r}, expected a count, a list of devices or auto.")
    return len(found)


def _autocast(precision: Any) -> torch.dtype | None:
    name = "32-true" if precision is None else str(precision)
    if name not in _PRECISIONS:
        raise ValueError(
            f"got trainer.precision {name!r}, expected one of {', '.join(_PRECISIONS)}: no other is planned."
        )
    return _PRECISIONS[name]


def _batch(data: Any, ranks: int) -> int:
    """Samples per rank."""
    if not isinstance(data, ShardDataModule):
        raise ValueError(f"got data from {type(data).__name__}, expected a data module over shards.")
    return data.rank_batch_size(ranks)


def _size(config: Any, data: Any, module: RetrainBlocks) -> dict[str, Any]:
    """Sizes of latent and caption, from options or else from shards."""
    facts = read_facts(read_config(module.base))
    given = {name: config[name] for name in ("frames", "height", "width")}
    longest, family = facts.longest_caption, family_titled(facts.family)
    tokens = longest if config.text_tokens is None else config.text_tokens
    if not 0 < tokens <= longest:
        raise ValueError(f"got text_tokens {tokens}, expected 1 to {longest}, the longest caption of the base.")
    text = {"text_tokens": tokens, "text_width": facts.text_width, "pooled_width": facts.pooled_width}
    if all(value is not None for value in given.values()):
        latent = Bucket(**given, family=family.name).latent_shape(facts.channels)
        return {"latent": latent, "latent_from": "--frames, --height, --width", **text}
    if any(value is not None for value in given.values()):
        raise ValueError(f"got {given}, expected all three of --frames, --height and --width, or none of them.")
    try:
        if not isinstance(data, BatchDataModule):
            raise ValueError(f"{type(data).__name__} names no latents.")
        data.check()
    except (ValueError, StoreError) as error:
        raise ValueError(
            f"{error}\nWithout shards the size of the latents is unknown, expected --frames, --height and --width of "
            "the clips, for example --frames {} --height {} --width {}.".format(*family.clip)
        ) from error
    name, latent = max(data.latent_shapes.items(), key=lambda entry: math.prod(entry[1]))
    for shape in data.latent_shapes.values():
        module.check_data(shape, data.text_width)
    return {"latent": latent, "latent_from": f"bucket {name} of the shards", **text}
