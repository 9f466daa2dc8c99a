"""Seconds of a step, and how they grow with the number of GPUs at an equal batch on each (weak scaling).

R ranks on M nodes of g GPUs, b bytes, B bytes a second past every point of the ring, a seconds of latency.

    ring all-reduce     2 (R - 1) (a + b / (R B))              Patarasuk and Yuan, 2009
    tree all-reduce     2 (log2 M + g - 1) a + 2 b / B         double binary trees, Sanders, Speck and Traeff, 2009
    all-gather, reduce-scatter, in a ring    (R - 1) (a + b / (R B))

NCCL takes ring or tree, whichever it holds for faster; so does the plan.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.plan.counts import Collective
from launch.plan.fake_step import BACKWARD, HEAD, TRUNK
from launch.plan.hardware import Hardware

#: Most GPUs of the table of weak scaling.
MOST_GPUS = 4096

#: Bytes that the optimiser and the averages read and write for each retrained number, all float32: AdamW reads weight,
#: gradient and two moments and writes three of them; the average reads two and writes one.
_UPDATE_BYTES = 4 * (7 + 3)


@dataclass(frozen=True)
class ComputeTime:
    """Seconds that a GPU computes in one optimiser step.

    Args:
        trunk: forward.
        head: forward.
        backward: of the head, recomputed activations included.
        update: clipping aside, of weights and averages.
        accumulate: micro-batches that trunk, head and backward are made of.
    """

    trunk: float
    head: float
    backward: float
    update: float
    accumulate: int = 1

    @property
    def total(self) -> float:
        """All of it, one after another."""
        return self.trunk + self.head + self.backward + self.update


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step on so many GPUs.

    Args:
        gpus: R.
        wire: seconds that all collectives take.
        bare: seconds of a step that hides none of them.
        overlapped: seconds where they run during the computing that neither makes nor needs what they carry.
        deferred: seconds where the head's gradients may also travel during the next step's trunk.
    """

    gpus: int
    wire: float
    bare: float
    overlapped: float
    deferred: float


def compute_time(
    flops: dict[str, int], retrained: int, accumulate: int, hardware: Hardware, *, sixteen_bit: bool
) -> ComputeTime:
    """Seconds of computing: operations over the assumed rate, the update's bytes over the memory's bandwidth."""
    rate = hardware.flops(sixteen_bit)
    trunk, head, backward = (accumulate * flops.get(stage, 0) / rate for stage in (TRUNK, HEAD, BACKWARD))
    return ComputeTime(trunk, head, backward, retrained * _UPDATE_BYTES / (hardware.memory_tb_s * 1e12), accumulate)


def collective_seconds(kind: str, size: int, ranks: int, nodes: int, hardware: Hardware, *, at_once: int = 1) -> float:
    """Of one collective over `size` bytes, on so many ranks that lie on so many nodes; of `at_once` such together."""
    if ranks <= 1:
        return 0.0
    latency, bandwidth = hardware.latency_us * 1e-6, hardware.bandwidth(nodes, at_once)
    ring = (ranks - 1) * (latency + size / (ranks * bandwidth))
    if kind != "all-reduce":
        return ring
    depth = math.ceil(math.log2(nodes)) + math.ceil(ranks / nodes) - 1
    return min(2 * ring, 2 * depth * latency + 2 * size / bandwidth)


def step_time(work: ComputeTime, found: Sequence[Collective], gpus: int, per_node: int, hardware: Hardware) -> StepTime:
    """Seconds of a step with these collectives.

    Those that carry the trunk's weights hide behind the trunk, the others behind the head's forward and backward.
    DDP's gradients travel once, with the last micro-batch: behind its backward pass, over which they come evenly, so
    that of n buckets the last can only leave at its end; or behind the trunk of the next step's first micro-batch.
    """
    seconds = {"trunk": 0.0, "head": 0.0}
    gradients, buckets = 0.0, 1
    for one in found:
        nodes = one.ranks if one.spread else math.ceil(one.ranks / per_node)
        at_once = per_node if one.spread else 1  # each rank of a node exchanges its own part, all of them together
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
    """(nodes, ranks of each) up to 4,096 ranks: parts of one node, whole nodes by powers of two, and the job's own."""
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
    """The step at 1 to 4,096 GPUs.

    Args:
        work: of one GPU.
        collectives: of a step, from nodes and ranks of each.
        node_size: GPUs of a whole node.
        own: nodes of the job and ranks of each, which has a row too.
        hardware: that is assumed.
    """
    return [
        step_time(work, collectives(nodes, ranks), nodes * ranks, ranks, hardware)
        for nodes, ranks in layouts(node_size, own)
    ]
