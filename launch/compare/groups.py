"""Runs of one recipe as a group, and how the recipes of groups differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from launch.fit.seeds import SEEDS
from launch.flat_recipe import flatten
from launch.report.results import RunResults

#: Beginnings of the dotted names of values that may differ between runs of one group: run name and folder, and
#: `seed_everything` with the seeds that follow it.
_OF_ONE_RUN = ("run.", "seed_everything", *SEEDS)


@dataclass(frozen=True)
class RunGroup:
    """Runs whose recipes differ in names and seeds alone.

    Args:
        runs: one or more runs.
    """

    runs: tuple[RunResults, ...]

    @property
    def names(self) -> list[str]:
        """Names of the run folders."""
        return [results.run.path.resolve().name for results in self.runs]

    @property
    def name(self) -> str:
        """The run's name; of several runs, the common start of their names and how many there are."""
        if len(self.runs) == 1:
            return self.names[0]
        first, last = min(self.names), max(self.names)
        common = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return f"{first[:common].rstrip('-_. ') or first} ({len(self.runs)} runs)"

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe's values by dotted name, without those that belong to one run."""
        return recipe_values(self.runs[0])

    @property
    def steps(self) -> str:
        """The step in the last row of each run's metrics.csv, without repeats; `group_runs` refuses several."""
        counts = {int(float(row["step"])) for r in self.runs for row in list(r.metrics)[-1:] if row.get("step")}
        return ", ".join(map(str, sorted(counts))) or "n/a"

    @property
    def shared_seeds(self) -> list[str]:
        """Seeds that two runs of the group have in common, as `data.seed 0`."""
        every = [seeds(results) for results in self.runs]
        return [
            f"{_short(name)} {value}"
            for name in every[0]
            for value in dict.fromkeys(each[name] for each in every)
            if sum(each[name] == value for each in every) > 1
        ]

    def differs_from(self, other: "RunGroup") -> list[str]:
        """Values of the recipe that differ from those of `other`, one per line of text."""
        names = sorted({*self.recipe, *other.recipe})
        return [
            f"{_short(name)}: {_value(self.recipe, name)} instead of {_value(other.recipe, name)}"
            for name in names
            if _value(self.recipe, name) != _value(other.recipe, name)
        ]


def recipe_values(results: RunResults) -> dict[str, Any]:
    """A run's recipe by dotted name, without what belongs to one run."""
    values = flatten(results.run.read_config())
    return {name: value for name, value in values.items() if name and not name.startswith(_OF_ONE_RUN)}


def seeds(results: RunResults) -> dict[str, Any]:
    """The seeds that a run has drawn from, by dotted name; `seed_everything` where the recipe names no other."""
    values = flatten(results.run.read_config())
    return {name: values.get(name, values.get("seed_everything")) for name in SEEDS}


def group_runs(runs: Sequence[RunResults]) -> list[RunGroup]:
    """Groups runs of equal recipes, in the order of their first runs.

    Raises:
        ValueError: if a run is given twice, or two runs of a group have one seed or have come to different steps.
    """
    seen: dict[str, RunResults] = {}
    groups: dict[str, list[RunResults]] = {}
    for results in runs:
        folder = str(results.run.path.resolve())
        if folder in seen:
            raise ValueError(f"got {folder} twice, expected each run once: a run repeated is no second seed.")
        seen[folder] = results
        groups.setdefault(repr(sorted(recipe_values(results).items())), []).append(results)
    found = [RunGroup(tuple(members)) for members in groups.values()]
    for group in found:
        drawn = [tuple(seeds(results).values()) for results in group.runs]
        if len(set(drawn)) < len(drawn):
            told = "; ".join(", ".join(map(str, each)) for each in drawn)
            raise ValueError(
                f"got runs {', '.join(group.names)} of one recipe with seeds {told}, expected another seed_everything "
                "for each: runs of one seed are no independent draws. Leave one out."
            )
        if "," in group.steps:
            raise ValueError(
                f"got runs of one recipe, {', '.join(group.names)}, that are at steps {group.steps}; expected all at "
                "the same step: let them finish, or leave one out."
            )
    return found


def _value(recipe: dict[str, Any], name: str) -> Any:
    return recipe.get(name, "nothing")


def _short(name: str) -> str:
    """A dotted name without `model.`, `data.` and `.init_args.`."""
    return name.replace(".init_args.", ".").removeprefix("model.").removeprefix("data.")
