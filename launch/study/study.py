"""What a study is: its units of work, how one is measured, and what the results say."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from launch.sample.generate import Pixels
from launch.study.settings import StudySettings
from launch.study.workbench import Workbench

Arrays = Mapping[str, NDArray]


@dataclass(frozen=True)
class Unit:
    """A piece of work with a result of its own.

    Args:
        prompt: index of the prompt.
        seed: of the noise.
        variant: name within the study; a file name.
    """

    prompt: int
    seed: int
    variant: str

    @property
    def key(self) -> str:
        """Its file name, without an ending."""
        return f"{self.prompt:03d}-{self.seed}-{self.variant}"


@dataclass(frozen=True)
class Effort:
    """Work for one (prompt, seed), besides the dense drawing that studies share.

    Args:
        videos: videos drawn.
        repeats: how often each kept call is repeated.
        together: drawings of two videos at once.
        conditional_repeats: how often, besides, the call of each measured step that has the conditional pass.
    """

    videos: int = 0
    repeats: int = 0
    conditional_repeats: int = 0
    together: int = 0


@dataclass(frozen=True)
class Measured:
    """The result of a unit.

    Args:
        arrays: figures by name.
        video: (T, H, W, 3) uint8, where one was drawn.
    """

    arrays: Arrays
    video: Pixels | None = None


@dataclass(frozen=True)
class Table:
    """A table of results: one CSV file, and a table of the page.

    Args:
        title: above it.
        columns: their names.
        rows: values; floats are rounded on the page only.
        note: below it.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass
class Findings:
    """What a study found.

    Args:
        sentences: in words, first on the page.
        tables: by file name.
        figures: by file name: caption and matplotlib figure.
        values: written as JSON.
        files: further JSON files by name.
        limits: what the study cannot show.
    """

    sentences: list[str] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, tuple[str, Figure]] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    limits: list[str] = field(default_factory=list)


class Results:
    """Results of all units.

    Args:
        measured: arrays by unit.
    """

    def __init__(self, measured: Mapping[Unit, Arrays]) -> None:
        self._measured = dict(measured)

    def __iter__(self) -> Iterator[Unit]:
        return iter(self._measured)

    def __getitem__(self, unit: Unit) -> Arrays:
        return self._measured[unit]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(prompt, seed) in order."""
        return sorted({(unit.prompt, unit.seed) for unit in self._measured})

    @property
    def prompts(self) -> list[int]:
        """The prompt of each of `pairs`, for intervals clustered by prompt."""
        return [prompt for prompt, _ in self.pairs]

    def has(self, variant: str) -> bool:
        """Whether a variant was measured."""
        return any(unit.variant == variant for unit in self._measured)

    def stack(self, variant: str, name: str) -> NDArray:
        """An array of a variant over `pairs`, (pairs, ...)."""
        return np.stack([self._measured[Unit(prompt, seed, variant)][name] for prompt, seed in self.pairs])


class Study(ABC):
    """A study; its constructor's keyword arguments are its own options."""

    #: Name of the command and of the folder.
    name: ClassVar[str]
    #: What is asked, in one sentence.
    question: ClassVar[str]

    @abstractmethod
    def check(self, work: Workbench) -> None:
        """Checks options against the base, before anything is drawn.

        Raises:
            ValueError: naming every fault.
        """

    @abstractmethod
    def variants(self, work: Workbench) -> list[str]:
        """Names of the units of every (prompt, seed)."""

    @abstractmethod
    def effort(self, settings: StudySettings) -> Effort:
        """What every (prompt, seed) takes, for plans."""

    def follow_up(self, results: Results, work: Workbench) -> list[str]:
        """Names of further units of every (prompt, seed), which need all results so far; none ends the work."""
        return []

    @abstractmethod
    def measure(self, unit: Unit, work: Workbench) -> Measured:
        """The result of a unit."""

    @abstractmethod
    def findings(self, results: Results, work: Workbench) -> Findings:
        """What all results say."""
