"""`reblock plan`: prints the estimates for a recipe as tables, and writes them as JSON."""

import json
from pathlib import Path
from typing import Any

from data.files import write_bytes
from launch.plan.estimates import estimate_from
from launch.plan.inputs import read_inputs
from launch.plan.table import show


def run(argv: list[str]) -> None:
    """Prints the plan of a recipe, e.g. ["plan", "--config", "recipes/demo.yaml", "--nodes", "2"], or of a study.

    Raises:
        ValueError: if recipe, base, sizes or layout are invalid; names every fault.
    """
    if "--study" in argv:
        from launch.plan.study import run as plan_study  # imported late: it brings the pipelines

        return plan_study(argv[1:])
    inputs = read_inputs(argv[1:])
    plan = estimate_from(inputs)
    show(plan)
    if inputs.json is not None:
        write_json(inputs.json, plan.as_json())


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Writes figures as a JSON file, atomically."""
    write_bytes(path, (json.dumps(figures, indent=2) + "\n").encode())
