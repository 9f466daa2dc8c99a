"""`reblock study NAME`: does what is left of a study's work, then writes tables, figures and a page."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data.files import atomic_file, settings_hash, write_json
from data.video.write import write_video
from launch.command_parser import CommandParser
from launch.study.config import StudyConfig, part_of, read_share
from launch.study.study import Results, Study, Unit
from launch.study.workbench import Workbench

#: Name -> module and class, and what it asks in one line.
STUDIES: dict[str, tuple[str, str]] = {
    "masking": ("launch.study.masking:Masking", "what the prediction loses without the smallest attention weights"),
    "sinks": ("launch.study.sinks:Sinks", "which heads have an attention sink, how often, where, with what values"),
    "skip-sinks": ("launch.study.skip_sinks:SkipSinks", "what the model loses without its sink heads"),
}


def usage() -> str:
    """What `reblock study --help` prints."""
    lines = [f"  {name:<12} {text}" for name, (_, text) in STUDIES.items()]
    return "usage: reblock study NAME [OPTIONS]\n\n" + "\n".join(lines) + "\n\n`reblock study NAME --help` says more."


def run(argv: Sequence[str]) -> None:
    """Runs `study NAME [OPTIONS]`.

    Raises:
        ValueError: if study, option or base is unknown or invalid.
    """
    name, *options = argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return print(usage())
    if name not in STUDIES:
        raise ValueError(f"got study {name!r}, expected one of: {', '.join(STUDIES)}.")
    module, kind = STUDIES[name][0].split(":")
    study_class = getattr(importlib.import_module(module), kind)
    parser = CommandParser(prog=f"reblock study {name}", description=study_class.question)
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(StudyConfig, as_group=False)
    own = parser.add_class_arguments(study_class, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(options))
    study = study_class(**{option: given[option] for option in own})
    config = StudyConfig(**{option: given[option] for option in StudyConfig.__dataclass_fields__})
    run_study(study, config, {option: given[option] for option in own})


def run_study(study: Study, config: StudyConfig, options: dict) -> Path | None:
    """Does this process's share of the units that have no result, then reports if none is left anywhere.

    Args:
        study: the study.
        config: options of every study.
        options: the study's own, which belong to its results.

    Returns:
        The page, or None where other processes have work left.
    """
    share = read_share(config.share)
    work = Workbench(config)
    study.check(work)
    folder = StudyFolder.of(study, work, options)
    units = [
        Unit(prompt, seed, variant)
        for prompt in range(len(work.prompts)) for seed in config.seeds for variant in study.variants(work)
    ]  # fmt: skip
    # Neighbours share a dense drawing.
    own = part_of(units, *share)
    left = [unit for unit in own if not folder.result(unit).is_file()]
    if len(left) < len(own):
        print(f"{folder.path}: {len(own) - len(left)} of {len(own)} results exist and are kept")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task(study.name, total=len(left))
        for unit in left:
            progress.update(task, description=f"{study.name} {unit.key}")
            folder.keep(unit, study.measure(unit, work))
            progress.advance(task)
    missing = sum(not folder.result(unit).is_file() for unit in units)
    if missing:
        print(f"{folder.path}: {missing} of {len(units)} results are left to other processes; run it again for a page")
        return None
    from launch.study.page import write_page  # imported late: matplotlib is slow to import

    found = study.findings(Results({unit: folder.arrays(unit) for unit in units}), work)
    return write_page(study, work, folder, units, found)


@dataclass(frozen=True)
class StudyFolder:
    """Results of a study under one set of options.

    Args:
        path: of the folder.
        fps: of its videos.
    """

    path: Path
    fps: int

    @classmethod
    def of(cls, study: Study, work: Workbench, options: dict) -> "StudyFolder":
        """The folder of these options; results of others have folders of their own."""
        said = work.settings | {"study": study.name, "layers": work.layers, "heads": work.config.heads}
        said |= {"options": {name: str(value) for name, value in options.items()}}
        path = work.config.out / study.name / settings_hash(said)
        if not (path / "study.json").is_file():
            write_json(path / "study.json", said)
        return cls(path, work.sampling.fps)

    def result(self, unit: Unit) -> Path:
        """The file of a unit's figures; where it is, the unit is done."""
        return self.path / "results" / f"{unit.key}.npz"

    def video(self, unit: Unit) -> Path:
        """The file of a unit's video."""
        return self.path / "videos" / f"{unit.key}.mp4"

    def keep(self, unit: Unit, measured) -> None:
        """Writes a unit's video, then its figures."""
        if measured.video is not None:
            write_video(self.video(unit), measured.video, self.fps)
        with atomic_file(self.result(unit)) as temporary, temporary.open("wb") as file:
            np.savez(file, **measured.arrays)

    def arrays(self, unit: Unit) -> dict:
        """A unit's figures."""
        with np.load(self.result(unit), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
