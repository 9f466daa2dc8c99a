"""What can be counted without running anything: parameters, gradients, buckets, bytes on the wire, a checkpoint's size.

R ranks, S ranks that share one copy of the model; a collective of b bytes sends from each of n ranks, in a ring,
2 (n - 1) / n b for an all-reduce, (n - 1) / n b for an all-gather or a reduce-scatter (Patarasuk and Yuan, "Bandwidth
optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from launch.plan.sharding import Sharding
from trainer.module import RetrainBlocks

#: Bytes that `torch.save` adds for each tensor: headers, alignment, its name, its entry in the index. Measured.
_PER_TENSOR = 420
#: Bytes of a checkpoint besides: loops, callbacks, random states. Measured.
_PER_FILE = 24_000


@dataclass(frozen=True)
class Parameters:
    """A built model in numbers and bytes.

    Args:
        retrained: numbers that are trained.
        frozen: numbers that are not.
        outside: bytes of what lies outside the blocks, all of it on every rank under FSDP2.
        trunk: bytes of the trunk's blocks.
        head: bytes of the blocks from the first retrained one on.
        gradients: bytes of all gradients.
        largest_gradients: bytes of one block's gradients, the largest.
        sizes: bytes of each gradient, in the order of the parameters.
        block_sizes: bytes of each block, in order.
        first: the first block of the head.
    """

    retrained: int
    frozen: int
    outside: int
    trunk: int
    head: int
    gradients: int
    largest_gradients: int
    sizes: tuple[int, ...]
    block_sizes: tuple[int, ...]
    first: int


def count_parameters(module: RetrainBlocks) -> Parameters:
    """Counts a module that was built, on whatever device."""
    model = module.split_model.transformer
    retrained = list(module.retrained_parameters().values())
    blocks = [_bytes(block.parameters()) for block in model.transformer_blocks]
    trained = [_bytes(p for p in block.parameters() if p.requires_grad) for block in model.transformer_blocks]
    return Parameters(
        retrained=sum(p.numel() for p in retrained),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        outside=_bytes(model.parameters()) - sum(blocks),
        trunk=sum(blocks[: module.first]),
        head=sum(blocks[module.first :]),
        gradients=_bytes(retrained),
        largest_gradients=max(trained),
        sizes=tuple(p.numel() * p.element_size() for p in retrained),
        block_sizes=tuple(blocks),
        first=module.first,
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def ddp_buckets(sizes: Sequence[int], cap: int, *, first: int) -> list[int]:
    """Bytes of DDP's buckets, in the order in which they are sent: gradients from the last to the first.

    A bucket closes once it holds `cap` bytes, the first one at `first`. So it is after the first step, when DDP has
    seen in which order gradients come; that they come in the parameters' reverse order is assumed.
    """
    buckets, held = list[int](), 0
    for size in reversed(sizes):
        held += size
        if held >= (cap if buckets else first):
            buckets.append(held)
            held = 0
    return [*buckets, held] if held else buckets


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one optimiser step.

    Args:
        kind: what is done.
        what: with which tensors.
        sizes: bytes of the whole tensor of each.
        ranks: that take part together.
        spread: these ranks lie on one node each.
        times: how often in a step.
        stage: that it can hide behind: the trunk's forward, or the head's forward and backward.
    """

    kind: Literal["all-reduce", "all-gather", "reduce-scatter"]
    what: str
    sizes: tuple[int, ...]
    ranks: int
    stage: Literal["trunk", "head"]
    spread: bool = False
    times: int = 1

    @property
    def bytes(self) -> int:
        """Handed in, in one step."""
        return self.times * sum(self.sizes)

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        turns = 2 if self.kind == "all-reduce" else 1
        return turns * self.bytes * (self.ranks - 1) // self.ranks


def ranks_per_copy(sharding: Sharding, nodes: int, per_node: int) -> int:
    """S, how many ranks share one copy of the model."""
    if sharding.name in ("single", "ddp"):
        return 1
    return per_node if sharding.name == "fsdp2" and sharding.over_node else nodes * per_node


def collectives(
    sharding: Sharding, counted: Parameters, nodes: int, per_node: int, *, accumulate: int, sixteen_bit: bool
) -> list[Collective]:
    """What goes over the wire in one optimiser step; measurements, validation and logging are left out.

    Args:
        sharding: how the model is spread.
        counted: the model.
        nodes: of the cluster.
        per_node: ranks of each.
        accumulate: micro-batches.
        sixteen_bit: ZeRO keeps weights and gradients in 16 bits (`bf16-mixed`).
    """
    ranks, shared = nodes * per_node, ranks_per_copy(sharding, nodes, per_node)
    if sharding.name == "single" or ranks == 1:
        return []
    if sharding.name == "ddp":
        buckets = tuple(ddp_buckets(counted.sizes, sharding.bucket_bytes, first=sharding.first_bucket_bytes))
        return [Collective("all-reduce", "gradients", buckets, ranks, "head")]
    first = counted.first
    if sharding.name == "fsdp2":
        trunk = counted.block_sizes[:first] if sharding.shard_trunk else ()
        head = counted.block_sizes[first:]
        even = tuple([counted.gradients // max(1, len(head))] * len(head))
        found = [
            Collective("all-gather", "trunk's blocks", trunk, shared, "trunk", times=accumulate),
            Collective("all-gather", "head's blocks, twice", head, shared, "head", times=2 * accumulate),
            Collective("reduce-scatter", "gradients", even, shared, "head", times=accumulate),
        ]
        if ranks > shared:
            parts = tuple(size // shared for size in even)
            found.append(
                Collective("all-reduce", "parts of gradients", parts, ranks // shared, "head", True, accumulate)
            )
        return [one for one in found if one.ranks > 1 and one.sizes]
    return _zero(sharding, counted, ranks, accumulate, 2 if sixteen_bit else 4)


def _zero(sharding: Sharding, counted: Parameters, ranks: int, accumulate: int, width: int) -> list[Collective]:
    """ZeRO's collectives: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models",
    2020, section 7: 2 psi elements for stages 1 and 2, 3 psi for stage 3, which also gathers the frozen trunk."""
    retrained = width * counted.retrained
    gradients = _cut(retrained, sharding.reduce_elements * width)
    reduced = accumulate if sharding.name != "zero1" else 1
    found = [Collective("reduce-scatter", "gradients", gradients, ranks, "head", times=reduced)]
    if sharding.name == "zero3":
        trunk = counted.block_sizes[: counted.first]
        head = tuple(size * width // 4 for size in counted.block_sizes[counted.first :])
        found += [
            Collective("all-gather", "trunk's blocks", trunk, ranks, "trunk", times=accumulate),
            Collective("all-gather", "head's blocks, twice", head, ranks, "head", times=2 * accumulate),
        ]
    else:
        pieces = _cut(retrained, sharding.gather_elements * width)
        found.append(Collective("all-gather", "new weights", pieces, ranks, "head"))
    return [one for one in found if one.sizes]


def _cut(size: int, most: int) -> tuple[int, ...]:
    """`size` bytes in pieces of at most `most`."""
    whole, rest = divmod(size, most)
    return (most,) * whole + ((rest,) if rest else ())


def checkpoint_bytes(module: RetrainBlocks) -> int:
    """Of `last.ckpt`: retrained weights, their averages in float32, and AdamW's two moments and counter."""
    retrained = module.retrained_parameters().values()
    tensors = sum(3 * p.numel() * p.element_size() + p.numel() * torch.float32.itemsize + 4 for p in retrained)
    return tensors + 5 * _PER_TENSOR * len(retrained) + _PER_FILE
