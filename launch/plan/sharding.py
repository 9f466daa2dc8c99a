"""Reads from a recipe's `trainer.strategy` how the model is sharded over ranks."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, SingleDeviceStrategy

from launch.fit.parser import class_at

STRATEGIES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Sharding:
    """Sharding of the model under a strategy.

    Args:
        name: one of `STRATEGIES`.
        over_node: FSDP2: whether the ranks of each node share a copy of the model, instead of all ranks.
        shard_trunk: FSDP2: whether the trunk's blocks are sharded too, and not only the head's.
        bucket_views: DDP: whether gradients are views of the buckets.
        bucket_bytes: DDP: size at which a bucket is full.
        first_bucket_bytes: DDP: size at which the first bucket is full; small by default, so that it is sent early.
        reduce_elements: ZeRO: number of elements in a communication buffer of gradients.
        gather_elements: ZeRO: number of elements in a communication buffer of weights.
        live_elements: ZeRO-3: largest number of weights that are unsharded at a time.
    """

    name: str
    over_node: bool = True
    shard_trunk: bool = True
    bucket_views: bool = False
    bucket_bytes: int = 25 * 2**20
    first_bucket_bytes: int = 2**20
    reduce_elements: int = 200_000_000
    gather_elements: int = 200_000_000
    live_elements: int = 1_000_000_000


def read_sharding(strategy: Any, ranks: int) -> Sharding:
    """Sharding of a recipe's `trainer.strategy`, which is one of Lightning's names, or a class with its arguments.

    Raises:
        ValueError: if the plan does not support the strategy.
    """
    name = strategy if isinstance(strategy, str) else strategy["class_path"]
    init = None if isinstance(strategy, str) else strategy.get("init_args")
    given: Mapping[str, Any] = vars(init) if init else {}
    if name == "auto":
        return Sharding("single" if ranks == 1 else "ddp")
    if name.startswith("ddp"):
        return Sharding("ddp")
    if name.startswith("deepspeed") and "offload" not in name:
        return Sharding(f"zero{name[-1] if name[-1] in '123' else 2}")
    try:
        kind = class_at(name)
    except ValueError:
        raise ValueError(_unknown(name)) from None
    if issubclass(kind, SingleDeviceStrategy):
        return Sharding("single")
    if issubclass(kind, DeepSpeedStrategy):  # before DDPStrategy, its base class
        offloads = any(given.get(f"offload_{part}") for part in ("optimizer", "parameters"))
        stage = given.get("stage", 2)
        if offloads or stage not in (1, 2, 3):
            raise ValueError(_unknown(name))
        default = Sharding("")
        return Sharding(
            f"zero{stage}",
            reduce_elements=int(given.get("reduce_bucket_size") or default.reduce_elements),
            gather_elements=int(given.get("allgather_bucket_size") or default.gather_elements),
        )
    if issubclass(kind, DDPStrategy):
        default = Sharding("ddp", bucket_views=bool(given.get("gradient_as_bucket_view")))
        if (cap := given.get("bucket_cap_mb")) is None:
            return default
        return dataclasses.replace(default, bucket_bytes=int(cap * 2**20), first_bucket_bytes=int(cap * 2**20))
    if issubclass(kind, ModelParallelStrategy):
        return Sharding(
            "fsdp2", over_node=given.get("shard_over", "node") == "node", shard_trunk=given.get("shard_trunk", True)
        )
    raise ValueError(_unknown(name))


def _unknown(name: str) -> str:
    return (
        f"got trainer.strategy {name!r}, expected auto, ddp, deepspeed_stage_1, _2 or _3, or a class of DDPStrategy, "
        "ModelParallelStrategy (FSDP2) or DeepSpeedStrategy of stage 1, 2 or 3 without offloading: others are not "
        "planned."
    )
