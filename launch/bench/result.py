"""A benchmark's table, printed with hardware and versions."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The table of a benchmark.

    Args:
        title: title above the table.
        columns: names of the columns.
        rows: cells of each row as text.
        notes: lines below the table.
        device: torch device that the benchmark ran on.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    device: str = "cpu"


def choose_device(device: str) -> str:
    """Returns `device`; for `auto`, cuda if torch sees a GPU, otherwise cpu."""
    import torch

    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def environment(device: str) -> str:
    """Versions and hardware as one line of text."""
    import torch

    from launch.versions import cpu_model
    from trainer.versions import package_versions

    found = package_versions(("torch", "triton", "lightning", "diffusers"))
    packages = [f"{package} {version or '?'}" for package, version in found.items()]
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_model()}, {torch.get_num_threads()} thread(s)"
    return f"{hardware}; python {platform.python_version()}, {', '.join(packages)}, {sys.platform}"


def show(result: BenchResult) -> None:
    """Prints a result with its notes and environment."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=result.title, title_justify="left")
    for index, column in enumerate(result.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in result.rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has no width of its own
    console.print(table)
    for line in (*result.notes, environment(result.device)):
        console.print(line, soft_wrap=True, highlight=False)
