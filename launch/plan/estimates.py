"""The complete estimate for a recipe: parameters, memory, operations, communication and time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

from launch.plan.counts import Collective, Parameters, checkpoint_bytes, collectives, count_parameters
from launch.plan.fake_step import fake_module, trace_step
from launch.plan.hardware import Hardware
from launch.plan.inputs import PlanInputs, read_inputs
from launch.plan.measurements import host_bytes, trace_measurements
from launch.plan.memory import Memory, memories
from launch.plan.sharding import STRATEGIES, Sharding
from launch.plan.timing import ComputeTime, StepTime, compute_time, weak_scaling


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimates for a run. Sizes are in bytes, times in seconds; operations are per rank and optimiser step.

    Args:
        strategy: the recipe's strategy: single, ddp, fsdp2, zero1, zero2 or zero3.
        nodes: number of nodes.
        gpu: whether the recipe runs on GPUs.
        gpus: number of ranks, one per device.
        node_size: GPUs per node in `scaling`.
        base: name of the base in the recipe.
        batch: samples per rank and micro-batch.
        accumulate: micro-batches per optimiser step.
        latent: (C, F, H, W) of the largest latent.
        latent_from: source of the latent's size.
        tokens: vision tokens and text tokens of a sample.
        parameters: parameter counts of the model.
        flops: operations by stage, for all micro-batches of a step.
        memory: memory of a GPU by strategy.
        wire: collectives of a step by strategy.
        checkpoint: bytes of `last.ckpt`.
        host: bytes of host memory per process for the trunk's output on the probes.
        work: seconds of computation.
        scaling: seconds of a step at 1 to 4,096 GPUs and at the job's own number, with the recipe's strategy and an
            equal batch per GPU.
        hardware: the assumed hardware.
        refused: why `fit` refuses the recipe, or None; the estimate of a refused recipe is for comparison only.
    """

    strategy: str
    nodes: int
    gpu: bool
    gpus: int
    node_size: int
    base: str
    batch: int
    accumulate: int
    latent: tuple[int, int, int, int]
    latent_from: str
    tokens: tuple[int, int]
    parameters: Parameters
    flops: dict[str, int]
    memory: dict[str, Memory]
    wire: dict[str, list[Collective]]
    checkpoint: int
    host: int
    work: ComputeTime
    scaling: list[StepTime]
    hardware: Hardware
    refused: str | None

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of a GPU by part, under the recipe's strategy."""
        return self.memory[self.strategy].parts

    @property
    def bytes_per_gpu(self) -> int:
        """Peak memory of a GPU in bytes, under the recipe's strategy."""
        return self.memory[self.strategy].total

    @property
    def fits(self) -> bool:
        """Whether the peak memory fits into the assumed GPU."""
        return self.bytes_per_gpu <= self.hardware.memory

    def as_json(self) -> dict[str, Any]:
        """All figures as plain values."""
        found = asdict(self)
        for name, memory in self.memory.items():
            found["memory"][name]["total"] = memory.total
        for name, wire in self.wire.items():
            for entry, one in zip(found["wire"][name], wire, strict=True):
                entry |= {"bytes": one.bytes, "sent": one.sent}
        return found | {"bytes_per_gpu": self.bytes_per_gpu, "fits": self.fits}


def estimate(recipe_args: Sequence[str], nodes: int | None = None) -> Estimate:
    """Estimates a run of a recipe.

    Args:
        recipe_args: options of `reblock fit`, and of `reblock plan` (`--frames`, `--hardware.memory_gib`, ...).
        nodes: number of nodes; None takes `--nodes`, or else the recipe's.

    Raises:
        ValueError: if recipe, base, sizes or layout are invalid; names every fault.
    """
    return estimate_from(read_inputs(list(recipe_args), nodes))


def estimate_from(inputs: PlanInputs) -> Estimate:
    """Estimates a run from the inputs; builds their module from fake tensors."""
    with fake_module(inputs) as counter:
        counted = count_parameters(inputs.module)
        checkpoint = checkpoint_bytes(inputs.module)
        step = trace_step(inputs, counter)
        measuring = trace_measurements(inputs, counter)
    sixteen_bit = inputs.autocast is not None
    layout: dict[str, Any] = {"accumulate": inputs.accumulate, "sixteen_bit": sixteen_bit}
    spent = compute_time(step.flops, counted.retrained, inputs.accumulate, inputs.hardware, sixteen_bit=sixteen_bit)
    patch = inputs.module.split_model.patch
    return Estimate(
        strategy=inputs.sharding.name,
        refused=inputs.refused,
        nodes=inputs.nodes,
        gpu=inputs.gpu,
        gpus=inputs.ranks,
        node_size=inputs.node_size,
        base=inputs.base,
        batch=inputs.batch,
        accumulate=inputs.accumulate,
        latent=inputs.latent,
        latent_from=inputs.latent_from,
        tokens=(prod(size // p for size, p in zip(inputs.latent[1:], patch, strict=True)), inputs.text_tokens),
        parameters=counted,
        flops={stage: inputs.accumulate * step.flops.get(stage, 0) for stage in ("trunk", "head", "backward")},
        memory=memories(
            inputs.sharding,
            counted,
            step.parts,
            step.allocations,
            measuring,
            inputs.nodes,
            inputs.per_node,
            sixteen_bit=sixteen_bit,
        ),
        wire={
            name: collectives(
                inputs.sharding if name == inputs.sharding.name else Sharding(name),
                counted,
                inputs.nodes,
                inputs.per_node,
                **layout,
            )
            for name in STRATEGIES
        },
        checkpoint=checkpoint,
        host=host_bytes(inputs, step.outcome // inputs.batch, step.rope),
        work=spent,
        scaling=weak_scaling(
            spent,
            partial(_collectives, inputs.sharding, counted, layout),
            inputs.node_size,
            (inputs.nodes, inputs.per_node),
            inputs.hardware,
        ),
        hardware=inputs.hardware,
    )


def _collectives(
    sharding: Sharding, counted: Parameters, layout: dict[str, Any], nodes: int, per_node: int
) -> list[Collective]:
    # A recipe for one rank scales to several ranks with DDP.
    spread = Sharding("ddp") if sharding.name == "single" else sharding
    return collectives(spread, counted, nodes, per_node, **layout)
