"""The plan as it is printed: nothing is cut at 100 columns, and what is assumed is said."""

import dataclasses
import io
import re

import pytest
from rich.console import Console

from launch.plan import estimate
from launch.plan.hardware import GIB
from launch.plan.memory import PARTS, Memory
from launch.plan.table import show
from tests.support.plans import CLIP, SMALL, recipe


def printed(plan):
    """Lines in a file, which has no width of its own."""
    file = io.StringIO()
    show(plan, Console(file=file))
    return file.getvalue().splitlines()


#: The teacher's blocks are counted among the weights.
SHOWN = [part for part in PARTS if part != "teacher"]


def row(lines, name, title):
    """Cells of a row of the table with this title."""
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return next(line for line in lines[start:] if line.strip().startswith(name)).split()


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    options = recipe(tmp_path_factory.mktemp("table"), trainer={"devices": 2, "num_nodes": 3, "strategy": "ddp"})
    return estimate([*options, *CLIP])


def sized(plan, factor):
    """The same plan with its memory times a factor."""
    memory = {
        name: Memory({part: int(size * factor) for part, size in one.parts.items()})
        for name, one in plan.memory.items()
    }
    return dataclasses.replace(plan, memory=memory)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("factor", [1e-3, 1, 10, 1e3, 1e5])
def test_no_cell_is_cut_whatever_the_size(plan, factor, strategy):
    scaled = dataclasses.replace(sized(plan, factor), strategy=strategy)
    lines = printed(scaled)
    assert not [line for line in lines if "\u2026" in line or "..." in line]
    tables = lines[next(i for i, line in enumerate(lines) if line.startswith("One optimiser step")) : -6]
    assert max(len(line.rstrip()) for line in tables) <= 100
    heads = next(line for line in lines if "activations" in line and "optimiser" in line).split()
    assert heads == [*SHOWN, "total"]


@pytest.mark.parametrize(("factor", "unit", "size"), [(1, "MiB", 2**20), (1e3, "GiB", GIB)])
def test_memory_is_told_in_a_unit_of_its_size(plan, factor, unit, size):
    scaled = sized(plan, factor)
    lines = printed(scaled)
    name, star, *cells = row(lines, "ddp", f"Memory of a GPU in {unit}")
    assert (name, star, len(cells)) == ("ddp", "*", len(SHOWN) + 1)
    values = [float(cell.replace(",", "")) for cell in cells]
    assert values[-1] == pytest.approx(scaled.bytes_per_gpu / size, rel=0.006)
    assert values[:-1] == pytest.approx([scaled.parts[part] / size for part in SHOWN], rel=0.006, abs=6e-4)
    assert all(len(cell.partition(".")[2]) <= 3 for cell in cells)
    (verdict,) = [line for line in lines if " fits; " in line or "NOT fit" in line]
    assert re.match(rf"ddp: [\d.,]+ {unit} of 79 GiB", verdict)


def test_a_recipe_for_a_cpu_is_told_whose_seconds_these_are(tmp_path, plan):
    said = [line for line in printed(plan) if "those of the GPU assumed" in line]
    assert len(said) == 1 and "no GPU" in said[0]
    gpu = estimate([*recipe(tmp_path, config=SMALL, trainer={"accelerator": "gpu"}), *CLIP])
    assert gpu.gpu and not [line for line in printed(gpu) if "those of the GPU assumed" in line]
