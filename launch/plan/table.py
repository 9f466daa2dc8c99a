"""Prints a plan as tables of at most 100 columns."""

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.plan.counts import Collective
from launch.plan.estimates import Estimate
from launch.plan.hardware import GIB, MIB
from launch.plan.memory import PARTS

_WIDTH = 100


def show(plan: Estimate, console: Console | None = None) -> None:
    """Prints a plan."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH, file=console.file)  # a file has no width of its own
    for line in _facts(plan):
        console.print(line, soft_wrap=True, highlight=False)
    for table in (_operations(plan), _memory(plan), _wire(plan), _scaling(plan)):
        console.print()
        console.print(table)
    for line in (*_verdict(plan), *([f"`fit` refuses this: {plan.refused}"] if plan.refused else [])):
        console.print(line, soft_wrap=True, highlight=False)


def _facts(plan: Estimate) -> list[str]:
    counted, (vision, text) = plan.parameters, plan.tokens
    every = counted.retrained + counted.frozen
    sample = "sample" if plan.batch == 1 else "samples"
    return [
        f"Base {plan.base}: {every / 1e6:,.1f} M parameters, {counted.retrained / 1e6:,.1f} M retrained, "
        f"{counted.frozen / 1e6:,.1f} M frozen",
        f"Latent {' x '.join(map(str, plan.latent))} ({plan.latent_from}): {vision:,} vision + {text} text tokens",
        f"{plan.gpus} GPU{'s' * (plan.gpus > 1)} on {plan.nodes} node{'s' * (plan.nodes > 1)}, strategy "
        f"{plan.strategy}, {plan.batch} {sample} per GPU"
        + (f", {plan.accumulate} micro-batches a step" if plan.accumulate > 1 else ""),
        f"Checkpoint {gib(plan.checkpoint)}; the trunk's outcome on the probes {gib(plan.host)} of host memory per "
        "process",
    ]


def _operations(plan: Estimate) -> Table:
    table = _table("One optimiser step of one GPU", "", "TFLOP", "seconds")
    rows = (
        ("trunk, forward", plan.flops["trunk"], plan.work.trunk),
        ("head, and teacher if there is one, forward", plan.flops["head"], plan.work.head),
        ("head, backward, with what is recomputed", plan.flops["backward"], plan.work.backward),
        ("weights and averages", 0, plan.work.update),
    )
    for name, flops, seconds in rows:
        table.add_row(name, f"{short(flops / 1e12)}" if flops else "", short(seconds))
    table.add_section()
    table.add_row("together", short(sum(plan.flops.values()) / 1e12), short(plan.work.total))
    return table


def _memory(plan: Estimate) -> Table:
    small = max(memory.total for memory in plan.memory.values()) < GIB
    unit, called = (MIB, "MiB") if small else (GIB, "GiB")
    # A column of its own would make the table wider than 100 characters.
    shown = [part for part in PARTS if part != "teacher"]
    table = _table(f"Memory of a GPU in {called}: activations or measurement, whichever is more", "", *shown, "total")
    for name, memory in plan.memory.items():
        parts = memory.parts | {"weights": memory.parts["weights"] + memory.parts["teacher"]}
        cells = [short(parts[part] / unit, 3) for part in shown]
        own = name == plan.strategy
        table.add_row(
            f"{name} *" if own else name, *cells, short(memory.total / unit, 3), style="bold" if own else None
        )
    return table


def _wire(plan: Estimate) -> Table:
    table = _table("On the wire in one optimiser step", "", "", "number", "GB", "GB sent per GPU")
    for name, wire in plan.wire.items():
        for one in wire:
            table.add_row(
                f"{name} *" if name == plan.strategy else name, _named(one), f"{one.times * len(one.sizes):,}",
                short(one.bytes / 1e9), short(one.sent / 1e9), style="bold" if name == plan.strategy else None,
            )  # fmt: skip
    if not table.rows:
        table.add_row("one GPU", "nothing")
    return table


def _named(one: Collective) -> str:
    return f"{one.kind} of {one.what}" + (f", {one.ranks} ranks" if one.spread else "")


def _scaling(plan: Estimate) -> Table:
    table = _table(
        "Weak scaling: seconds of a step, by what collectives hide behind", "GPUs", "wire", "nothing", "own step",
        "next trunk", "samples / s", "efficiency",
    )  # fmt: skip
    alone = plan.scaling[0].overlapped
    for step in plan.scaling:
        rate = step.gpus * plan.batch * plan.accumulate / step.overlapped
        table.add_row(
            f"{step.gpus:,}", short(step.wire), short(step.bare), short(step.overlapped), short(step.deferred),
            short(rate), f"{alone / step.overlapped:.1%}",
        )  # fmt: skip
    return table


def _verdict(plan: Estimate) -> Sequence[str]:
    hardware, need = plan.hardware, plan.bytes_per_gpu
    says = "fits" if plan.fits else "does NOT fit"
    cpu = () if plan.gpu else (
        "The recipe's accelerator is no GPU: seconds and the memory there is are those of the GPU assumed.",
    )  # fmt: skip
    return (
        "",
        f"{plan.strategy}: {gib(need)} of {hardware.memory_gib:g} GiB ({need / hardware.memory:.0%}) {says}; the "
        "driver, libraries and fragmentation take more.",
        *cpu,
        "Samples / s and efficiency are those of 'own step', which is what `fit` does.",
        f"Assumed, not measured: {hardware.tflops:g} TFLOP/s in 16 bits ({hardware.tflops_float32:g} in float32), of "
        f"which {hardware.share:.0%} is reached, {hardware.intra_gb_s:g} GB/s in a node of {plan.node_size}, "
        f"{hardware.inter_gb_s:g} GB/s from node to node, {hardware.link_share:.0%} of it reached, "
        f"{hardware.latency_us:g} us a message. Set --hardware.NAME; docs/plan.md says what is left out.",
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1))
    for index, column in enumerate(columns):
        words = not index or not column
        table.add_column(column, justify="left" if words else "right", no_wrap=True)
    return table


def gib(size: float) -> str:
    """Bytes as text, in GiB or MiB."""
    return f"{short(size / GIB, 3)} GiB" if size >= GIB else f"{short(size / MIB, 3)} MiB"


def short(value: float, most: int = 6) -> str:
    """A number as text with three significant digits, or more if it is large, and at most `most` decimals."""
    if not value:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(digits, most)}f}"
