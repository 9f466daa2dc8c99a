"""Counts what needs no forward pass: parameters, gradients, DDP buckets, communicated bytes, checkpoint size.

R ranks, S ranks that share one copy of the model. In a ring collective of b bytes, each of n ranks sends
2 (n - 1) / n b for an all-reduce, and (n - 1) / n b for an all-gather or a reduce-scatter (Patarasuk and Yuan,
"Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from launch.plan.sharding import Sharding
from trainer.module import RetrainBlocks

#: Bytes that `torch.save` adds for each tensor: headers, alignment, name, index entry. Measured.
_PER_TENSOR = 420
#: Bytes of all other content of a checkpoint: loops, callbacks, random states. Measured.
_PER_FILE = 24_000


@dataclass(frozen=True)
class Parameters:
    """Parameter counts and sizes of a model.

    Args:
        retrained: number of trained parameters.
        frozen: number of frozen parameters.
        outside: bytes of the parameters outside the blocks; FSDP2 replicates them on every rank.
        trunk: bytes of the trunk's blocks.
        head: bytes of the blocks from the first retrained one on.
        gradients: bytes of all gradients.
        largest_gradients: bytes of the gradients of the block that has the most.
        sizes: bytes of each gradient, in the order of the parameters.
        block_sizes: bytes of each block, in order.
        first: index of the first block of the head.
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
    """Counts the parameters of a built module on any device."""
    model = module.split_model.transformer
    retrained = list(module.retrained_parameters().values())
    blocks = [_bytes(block.parameters()) for block in module.split_model.blocks]
    trained = [_bytes(p for p in block.parameters() if p.requires_grad) for block in module.split_model.blocks]
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
    """Bytes of DDP's buckets in the order in which they are sent, which starts with the last parameters' gradients.

    A bucket is full once it holds `cap` bytes; the first bucket, once it holds `first` bytes. DDP builds these buckets
    after the first step, in the order of the gradients. The estimate assumes the parameters' reverse order.
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
        kind: kind of the collective.
        what: name of the tensors, for tables.
        sizes: bytes of the whole tensor in each collective.
        ranks: number of ranks in each collective.
        stage: computation to overlap with: the trunk's forward, or the head's forward and backward.
        spread: whether each of these ranks is on a node of its own.
        times: number of repetitions in a step.
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
        """Input bytes of all these collectives in one step."""
        return self.times * sum(self.sizes)

    @property
    def sent(self) -> int:
        """Bytes that each rank sends in one step."""
        turns = 2 if self.kind == "all-reduce" else 1
        return turns * self.bytes * (self.ranks - 1) // self.ranks


def ranks_per_copy(sharding: Sharding, nodes: int, per_node: int) -> int:
    """S, the number of ranks that share one copy of the model."""
    if sharding.name in ("single", "ddp"):
        return 1
    return per_node if sharding.name == "fsdp2" and sharding.over_node else nodes * per_node


def collectives(
    sharding: Sharding, counted: Parameters, nodes: int, per_node: int, *, accumulate: int, sixteen_bit: bool
) -> list[Collective]:
    """The collectives of one optimiser step, without those of measurements, validation and logging.

    Args:
        sharding: sharding of the model.
        counted: parameter counts of the model.
        nodes: number of nodes.
        per_node: ranks per node.
        accumulate: micro-batches per optimiser step.
        sixteen_bit: whether ZeRO keeps weights and gradients in 16 bits (`bf16-mixed`).
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
    """Splits `size` bytes into pieces of at most `most` bytes."""
    whole, rest = divmod(size, most)
    return (most,) * whole + ((rest,) if rest else ())


def checkpoint_bytes(module: RetrainBlocks) -> int:
    """Size of `last.ckpt`: retrained weights, their float32 averages, and AdamW's two moments and step counter."""
    retrained = module.retrained_parameters().values()
    tensors = sum(3 * p.numel() * p.element_size() + p.numel() * torch.float32.itemsize + 4 for p in retrained)
    return tensors + 5 * _PER_TENSOR * len(retrained) + _PER_FILE
