"""Seconds of a step, and how they grow with the number of GPUs at an equal batch per GPU (weak scaling).

R ranks on M nodes of g GPUs, b bytes, B bandwidth of the ring in bytes a second, a latency in seconds.

    ring all-reduce     2 (R - 1) (a + b / (R B))              Patarasuk and Yuan, 2009
    tree all-reduce     2 (log2 M + g - 1) a + 2 b / B         double binary trees, Sanders, Speck and Traeff, 2009
    all-gather, reduce-scatter, in a ring    (R - 1) (a + b / (R B))

NCCL chooses ring or tree by its estimate of their speed; so does the plan.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.plan.counts import Collective
from launch.plan.fake_step import BACKWARD, HEAD, TRUNK
from launch.plan.hardware import Hardware

#: Largest number of GPUs in the table of weak scaling.
MOST_GPUS = 4096

#: Bytes that optimiser and averages read and write for each retrained parameter, in float32: AdamW reads weight,
#: gradient and two moments, and writes all but the gradient. The average reads two values and writes one.
_UPDATE_BYTES = 4 * (7 + 3)


@dataclass(frozen=True)
class ComputeTime:
    """Seconds of computation of a GPU in one optimiser step.

    Args:
        trunk: forward pass of the trunk.
        head: forward pass of the head.
        backward: backward pass of the head, with recomputed activations.
        update: update of weights and averages, without clipping.
        accumulate: number of micro-batches in `trunk`, `head` and `backward`.
    """

    trunk: float
    head: float
    backward: float
    update: float
    accumulate: int = 1

    @property
    def total(self) -> float:
        """Seconds of all parts together."""
        return self.trunk + self.head + self.backward + self.update


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on some number of GPUs.

    Args:
        gpus: R, number of GPUs.
        wire: seconds of all collectives.
        bare: seconds of a step without overlap.
        overlapped: seconds of a step whose collectives overlap with independent computation of the same step.
        deferred: seconds of a step whose gradient collectives may also overlap with the next step's trunk.
    """

    gpus: int
    wire: float
    bare: float
    overlapped: float
    deferred: float


def compute_time(
    flops: dict[str, int], retrained: int, accumulate: int, hardware: Hardware, *, sixteen_bit: bool
) -> ComputeTime:
    """Seconds of computation: operations over the assumed rate, and the update's bytes over the memory bandwidth."""
    rate = hardware.flops(sixteen_bit)
    trunk, head, backward = (accumulate * flops.get(stage, 0) / rate for stage in (TRUNK, HEAD, BACKWARD))
    return ComputeTime(trunk, head, backward, retrained * _UPDATE_BYTES / (hardware.memory_tb_s * 1e12), accumulate)


def collective_seconds(kind: str, size: int, ranks: int, nodes: int, hardware: Hardware, *, at_once: int = 1) -> float:
    """Seconds of one collective of `size` bytes over `ranks` on `nodes`, while `at_once` such collectives run."""
    if ranks <= 1:
        return 0.0
    latency, bandwidth = hardware.latency_us * 1e-6, hardware.bandwidth(nodes, at_once)
    ring = (ranks - 1) * (latency + size / (ranks * bandwidth))
    if kind != "all-reduce":
        return ring
    depth = math.ceil(math.log2(nodes)) + math.ceil(ranks / nodes) - 1
    return min(2 * ring, 2 * depth * latency + 2 * size / bandwidth)


def step_time(work: ComputeTime, found: Sequence[Collective], gpus: int, per_node: int, hardware: Hardware) -> StepTime:
    """Seconds of a step with the collectives `found`.

    Collectives of the trunk's weights overlap with the trunk, the others with the head's forward and backward pass.
    DDP reduces gradients once, in the backward pass of the last micro-batch. It fills its n buckets evenly over this
    pass, so the last bucket is sent after it. If deferred, it overlaps with the trunk of the next step's first
    micro-batch.
    """
    seconds = {"trunk": 0.0, "head": 0.0}
    gradients, buckets = 0.0, 1
    for one in found:
        nodes = one.ranks if one.spread else math.ceil(one.ranks / per_node)
        at_once = per_node if one.spread else 1  # all ranks of a node exchange their own parts at the same time
        spent = one.times * sum(
            collective_seconds(one.kind, size, one.ranks, nodes, hardware, at_once=at_once) for size in one.sizes
        )
        if one.kind == "all-reduce" and not one.spread:
            gradients, buckets = spent, len(one.sizes)
        else:
            seconds[one.stage] += spent
    wire = sum(seconds.values()) + gradients
    last = work.backward / work.accumulate
    seen = max(gradients - last * (buckets - 1) / buckets, gradients / buckets)
    left = max(0.0, seconds["trunk"] - work.trunk) + max(0.0, seconds["head"] - work.head - work.backward)
    return StepTime(
        gpus=gpus,
        wire=wire,
        bare=work.total + wire,
        overlapped=work.total + left + seen,
        deferred=work.total + left + max(0.0, seen - work.trunk / work.accumulate),
    )


def layouts(node_size: int, own: tuple[int, int]) -> list[tuple[int, int]]:
    """(nodes, ranks per node) up to 4,096 ranks: parts of one node, powers of two of whole nodes, and the job's own."""
    powers = [2**power for power in range(13)]
    found = {(1, ranks) for ranks in powers if ranks < node_size}
    found |= {(nodes, node_size) for nodes in powers if nodes * node_size <= MOST_GPUS}
    taken = {nodes * ranks for nodes, ranks in found}
    if own[0] * own[1] not in taken:
        found.add(own)
    return sorted(found, key=math.prod)


def weak_scaling(
    work: ComputeTime,
    collectives: Callable[[int, int], Sequence[Collective]],
    node_size: int,
    own: tuple[int, int],
    hardware: Hardware,
) -> list[StepTime]:
    """Step times at 1 to 4,096 GPUs.

    Args:
        work: computation of one GPU.
        collectives: function from (nodes, ranks per node) to the collectives of a step.
        node_size: GPUs of a whole node.
        own: (nodes, ranks per node) of the job, which gets a row of its own.
        hardware: the assumed hardware.
    """
    return [
        step_time(work, collectives(nodes, ranks), nodes * ranks, ranks, hardware)
        for nodes, ranks in layouts(node_size, own)
    ]
