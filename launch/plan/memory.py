"""Memory per GPU by part under each strategy, from the traced step and the strategy's share of every part.

R ranks, S ranks that share one copy of the model, psi retrained parameters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.plan.counts import Parameters, ranks_per_copy
from launch.plan.operations import Allocation
from launch.plan.sharding import STRATEGIES, Sharding

#: Parts of the memory, in the order of the tables.
PARTS = ("weights", "teacher", "gradients", "optimiser", "ema", "buffers", "activations", "measurement")

_FLOAT32 = 4


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU.

    Args:
        parts: bytes of each of `PARTS`. `activations` is what a step adds to the earlier parts at its peak.
            `measurement` is what measurements and validation add to them. The two never exist at the same time.
    """

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Peak memory in bytes."""
        kept = sum(self.parts[name] for name in PARTS[:-2])
        return kept + max(self.parts["activations"], self.parts["measurement"])


def memory_of(
    sharding: Sharding,
    counted: Parameters,
    parts: dict[str, int],
    allocations: Sequence[Allocation],
    measuring: int,
    nodes: int,
    per_node: int,
    *,
    sixteen_bit: bool,
) -> Memory:
    """Memory of a GPU under a strategy.

    Args:
        sharding: sharding of the model.
        counted: parameter counts of the model.
        parts: bytes of weights, gradients, optimiser state and averages without sharding.
        allocations: allocations of the traced step.
        measuring: peak bytes of gradients and activations in measurements.
        nodes: number of nodes.
        per_node: ranks per node.
        sixteen_bit: whether ZeRO keeps weights and gradients in 16 bits (`bf16-mixed`).
    """
    shared = ranks_per_copy(sharding, nodes, per_node)
    kept = _KEPT[sharding.name](sharding, counted, parts, shared, 2 if sixteen_bit else _FLOAT32)
    share = kept["gradients"] / parts["gradients"]
    step = max(int(share * allocation.gradients) + allocation.rest for allocation in allocations)
    extra = measuring - parts["gradients"] if measuring else 0
    return Memory(kept | {"activations": max(0, step - kept["gradients"]), "measurement": max(0, extra)})


def memories(
    sharding: Sharding,
    counted: Parameters,
    parts: dict[str, int],
    allocations: Sequence[Allocation],
    measuring: int,
    nodes: int,
    per_node: int,
    *,
    sixteen_bit: bool,
) -> dict[str, Memory]:
    """`memory_of` for every strategy: the recipe's own with its settings, the others with default settings."""
    largest = _highest(allocations)
    return {
        name: memory_of(
            sharding if name == sharding.name else Sharding(name), counted, parts, largest, measuring, nodes, per_node,
            sixteen_bit=sixteen_bit,
        )
        for name in STRATEGIES
    }  # fmt: skip


def _highest(allocations: Sequence[Allocation]) -> list[Allocation]:
    """Allocations that may be the peak under some strategy: the one with the largest rest for each gradient size."""
    best: dict[int, Allocation] = {}
    for allocation in allocations:
        if allocation.gradients not in best or allocation.rest > best[allocation.gradients].rest:
            best[allocation.gradients] = allocation
    return list(best.values())


def _single(sharding: Sharding, counted: Parameters, parts: dict[str, int], shared: int, width: int) -> dict[str, int]:
    return {**parts, "buffers": 0}


def _ddp(sharding: Sharding, counted: Parameters, parts: dict[str, int], shared: int, width: int) -> dict[str, int]:
    """Each gradient also has a copy in a bucket, unless gradients are views of the buckets."""
    return {**parts, "buffers": 0 if sharding.bucket_views else counted.gradients}


def _fsdp2(sharding: Sharding, counted: Parameters, parts: dict[str, int], shared: int, width: int) -> dict[str, int]:
    """Blocks, gradients, states and averages are sharded. Two blocks are unsharded at a time, the current and the next
    one. One block's gradients exist twice: as autograd produces them, and in the order for communication."""
    blocks = counted.block_sizes[0 if sharding.shard_trunk else counted.first :]
    whole = sum(sorted(blocks)[-2:]) + 2 * counted.largest_gradients
    kept = counted.outside + counted.trunk + counted.head - sum(blocks)
    return {
        "weights": kept + -(-sum(blocks) // shared),
        "teacher": parts["teacher"],
        **{name: -(-parts[name] // shared) for name in ("gradients", "optimiser", "ema")},
        "buffers": whole if shared > 1 else 0,
    }


def _zero(stage: int) -> Callable[..., dict[str, int]]:
    """DeepSpeed ZeRO keeps weights in `width` bytes each. The two moments, and master weights if `width` is 2, are
    float32 and sharded. Our averages are float32 and unsharded, except in stage 3."""

    def kept(sharding: Sharding, counted: Parameters, parts: dict[str, int], shared: int, width: int) -> dict[str, int]:
        retrained = counted.retrained
        head = counted.head * width // _FLOAT32
        weights = counted.outside + counted.trunk + head
        gradients = retrained * width
        states = retrained * (8 + (_FLOAT32 if width == 2 else 0))
        ema = parts["ema"]
        buffers = min(gradients, 2 * sharding.reduce_elements * width)
        if stage == 3:
            live = min(weights, sharding.live_elements * width)
            weights, ema, buffers = -(-weights // shared), -(-ema // shared), buffers + live
        else:
            buffers += min(gradients, sharding.gather_elements * width)
        return {
            "weights": weights,
            "teacher": parts["teacher"],
            "gradients": gradients if stage == 1 else -(-gradients // shared),
            "optimiser": -(-states // shared),
            "ema": ema,
            "buffers": buffers if shared > 1 else 0,
        }

    return kept


_KEPT: dict[str, Callable[..., dict[str, int]]] = {
    "single": _single, "ddp": _ddp, "fsdp2": _fsdp2, "zero1": _zero(1), "zero2": _zero(2), "zero3": _zero(3),
}  # fmt: skip
