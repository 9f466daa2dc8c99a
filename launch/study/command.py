"""`reblock study NAME`: does what is left of a study's work, then writes tables, figures and a page."""

import importlib
import itertools
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch.command_parser import CommandParser
from launch.study.config import StudyConfig, part_of, read_share
from launch.study.folder import StudyFolder
from launch.study.page import write_page
from launch.study.study import Study, Unit
from launch.study.workbench import Workbench

#: Name -> module and class, and what it asks in one line.
STUDIES: dict[str, tuple[str, str]] = {
    "profile": ("launch.study.profile:Profile", "the share of attention weights that each layer and head can lose"),
    "masking": ("launch.study.masking:Masking", "what the prediction loses without the smallest attention weights"),
    "first-token": ("launch.study.first_token:FirstToken", "what one text token alone tells the model of the caption"),
    "temperature": ("launch.study.temperature:Temperature", "what a sharper or flatter softmax of one layer changes"),
    "retraining": ("launch.study.retraining:Retraining", "sinks, masking and detail of a base and of retrained models"),
    "sinks": ("launch.study.sinks:Sinks", "which heads have an attention sink, how often, where, with what values"),
    "structure": ("launch.study.structure:Structure", "what attention maps look like, and what prompts share of it"),
    "transfer": ("launch.study.transfer:Transfer", "what becomes of a video with the attention maps of another prompt"),
    "skip-sinks": ("launch.study.skip_sinks:SkipSinks", "what the model loses without its sink heads"),
}


def usage() -> str:
    """What `reblock study --help` prints."""
    lines = [f"  {name:<12} {text}" for name, (_, text) in STUDIES.items()]
    return "usage: reblock study NAME [OPTIONS]\n\n" + "\n".join(lines) + "\n\n`reblock study NAME --help` says more."


def study_class(name: str) -> type[Study]:
    """The class of a study.

    Raises:
        ValueError: if there is none of this name.
    """
    if name not in STUDIES:
        raise ValueError(f"got study {name!r}, expected one of: {', '.join(STUDIES)}.")
    module, kind = STUDIES[name][0].split(":")
    return getattr(importlib.import_module(module), kind)


def run(argv: Sequence[str]) -> None:
    """Runs `study NAME [OPTIONS]`.

    Raises:
        ValueError: if study, option or base is unknown or invalid.
    """
    name, *options = argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return print(usage())
    kind = study_class(name)
    parser = CommandParser(prog=f"reblock study {name}", description=kind.question)
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_class_arguments(StudyConfig, as_group=False)
    own = parser.add_class_arguments(kind, as_group=False)
    given = parser.instantiate_classes(parser.parse_args(options))
    study = kind(**{option: given[option] for option in own})
    config = StudyConfig(**{option: given[option] for option in StudyConfig.__dataclass_fields__})
    run_study(study, config, {option: given[option] for option in own})


def run_study(study: Study, config: StudyConfig, options: dict, work: Workbench | None = None) -> Path | None:
    """Does this process's share of the units that have no result, then reports if none is left anywhere.

    Args:
        study: the study.
        config: options of every study.
        options: the study's own, which belong to its results.
        work: workbench of this config, where one is loaded already.

    Returns:
        The page, or None where other processes have work left.
    """
    share = read_share(config.share)
    work = work or Workbench(config)
    study.check(work)
    folder = StudyFolder.of(study, work, options)
    pairs = [(prompt, seed) for prompt in range(len(work.prompts)) for seed in config.seeds]
    units: list[Unit] = []
    names = study.variants(work) or study.follow_up(folder.results(units), work)
    while names:
        more = [Unit(prompt, seed, variant) for (prompt, seed), variant in itertools.product(pairs, names)]
        if not _measure(study, work, folder, more, share):
            return None
        units += more
        names = study.follow_up(folder.results(units), work)

    found = study.findings(folder.results(units), work)
    return write_page(study, work, folder, units, found)


def _measure(study: Study, work: Workbench, folder: StudyFolder, units: Sequence[Unit], share: tuple[int, int]) -> bool:
    """Measures this process's share of the units that have no result; returns whether all units have one now."""
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
    return not missing
