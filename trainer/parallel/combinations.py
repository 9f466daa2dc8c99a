"""Combinations of settings that cannot work, found before anything is loaded."""

from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy, Strategy

from trainer.models.load import read_config, read_facts
from trainer.parallel.strategies import ShardedStrategy
from trainer.surgery import SurgeryConfig

#: Retrained blocks and their averages are kept in float32; `bf16-mixed` computes in bfloat16 from them.
PRECISIONS = ("32-true", "bf16-mixed")

#: The fault of a recipe with a DeepSpeed strategy.
NO_DEEPSPEED = (
    "got trainer.strategy DeepSpeedStrategy, expected DDP or trainer.parallel.strategies.ShardedStrategy: DeepSpeed "
    "takes no model of two dtypes, hides gradients, so that a step that is not finite could not be skipped, and "
    "writes folders that no other strategy resumes from. For the memory of ZeRO-1 and -2 add --config "
    "recipes/cluster/fsdp2_head.yaml, for that of ZeRO-3 --config recipes/cluster/fsdp2.yaml."
)


def check_shards(base: str, latent_shape: tuple[int, ...], text_width: int) -> None:
    """Checks that shards of (C, F, H, W) latents and captions of `text_width` fit the base.

    Raises:
        ValueError: if they do not.
    """
    facts = read_facts(read_config(base))
    if latent_shape[0] != facts.channels or any(
        size % patch for size, patch in zip(latent_shape[1:], facts.patch, strict=True)
    ):
        raise ValueError(
            f"the shards hold latents of shape {tuple(latent_shape)}, the base {base} of {facts.family} takes "
            f"({facts.channels}, F, H, W) with F, H and W multiples of {', '.join(map(str, facts.patch))}; encode the "
            "clips with this base's own VAE (`reblock encode`)."
        )
    if text_width != facts.text_width:
        raise ValueError(
            f"the shards hold captions {text_width} wide, the base {base} of {facts.family} takes {facts.text_width}; "
            "encode them with this base's own text encoder (`reblock encode`)."
        )


def check_trainer(
    strategy: type[Strategy],
    precision: str,
    gradient_clip_val: float | None,
    surgery: SurgeryConfig,
    *,
    split_trunk: bool = True,
) -> None:
    """Checks that strategy, precision and clipping fit what is retrained.

    Called twice: with the recipe's values before any of its objects is made, and with the Trainer's before the base is
    loaded.

    Args:
        strategy: class of the strategy.
        precision: as the Trainer names it, e.g. "bf16-mixed".
        gradient_clip_val: of the Trainer.
        surgery: what is retrained.
        split_trunk: of the module.

    Raises:
        ValueError: naming every fault.
    """
    faults = []
    if precision not in PRECISIONS:
        faults.append(
            f"got trainer.precision {precision!r}, expected {' or '.join(map(repr, PRECISIONS))}: the retrained blocks "
            "are kept in float32, whatever they are computed in, and their gradients are not scaled."
        )
    if gradient_clip_val is not None:
        faults.append(
            f"got trainer.gradient_clip_val {gradient_clip_val}, expected none: gradients are clipped by "
            "model.optim.clip_norm, which also drops the step of a gradient that is not finite. Set that instead."
        )
    foreign = issubclass(strategy, ModelParallelStrategy) and not issubclass(strategy, ShardedStrategy)
    if foreign or issubclass(strategy, FSDPStrategy):
        faults.append(
            f"got trainer.strategy {strategy.__name__}, expected trainer.parallel.strategies.ShardedStrategy, FSDP2 "
            "with checkpoints of whole tensors: add --config recipes/cluster/fsdp2.yaml."
        )
    if issubclass(strategy, DeepSpeedStrategy):
        faults.append(NO_DEEPSPEED)
    if issubclass(strategy, ShardedStrategy):
        asked = {
            "surgery.train_outside": surgery.train_outside,
            "surgery.reserved_channels": bool(surgery.reserved_channels),
            "split_trunk: false": not split_trunk,
        }
        faults += [
            f"got model.{what} with ShardedStrategy, expected DDP or a single device: sharding takes retrained blocks "
            "behind a frozen trunk. Take the strategy's overlay away."
            for what, wanted in asked.items()
            if wanted
        ]
    if faults:
        raise ValueError("\n".join(faults))
