"""The `reblock` command: finds the function of a command, reads its arguments and calls it."""

import atexit
import gc
import importlib
import importlib.util
import inspect
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from launch import signals

#: Command -> location of its function, and one line of description. Only the module of the given command is imported.
COMMANDS: dict[str, tuple[str, str]] = {
    "synth": ("data.synth.command:synth", "make procedural captioned clips, real H.264 files"),
    "synth-latents": ("data.synth.latents:synth_latents", "make richer procedural clips, straight to latent shards"),
    "pack": ("data.pack.command:pack", "folder of clips and captions -> video shards"),
    "encode": ("data.encode.command:encode", "video shards -> latent shards"),
    "inspect": ("data.inspect.command:inspect", "counts, shapes, durations and faults of shards"),
    "plant": ("launch.demo.plant_sinks:plant", "a base with attention sinks planted in its last blocks"),
    "pipeline": ("launch.demo.assemble_base:pipeline", "assemble a diffusers pipeline folder from trained parts"),
    "plan": ("launch.plan.command:run", "memory, operations, bytes on the wire and time of a recipe, without a GPU"),
    "fit": ("launch.fit.cli:run", "retrain the chosen blocks as a recipe says"),
    "validate": ("launch.fit.cli:run", "all measurements, no training"),
    "submit": ("launch.cluster.submit:run", "a recipe as a Slurm job: checks, writes the script, queues it"),
    "status": ("launch.cluster.status:status", "what a run's jobs do, since when, how fast, and its last errors"),
    "export": ("launch.export:export", "graft -> a pipeline folder that diffusers loads"),
    "sample": ("launch.sample.command:sample", "videos: base, retrained, retrained and masked, same seeds"),
    "report": ("launch.report.command:report", "one self-contained page about a run"),
    "study": ("launch.study.command:run", "one finding about attention, measured on a checkpoint with its controls"),
    "compare": ("launch.compare.command:compare", "one page about several runs: controls, seeds, objectives"),
    "bench": ("launch.bench.command:run", "the benchmarks"),
    "demo": ("launch.demo.command:demo", "the whole road on a tiny model, in minutes"),
}

#: Known, harmless and repeated warnings of libraries, which would hide important ones.
KNOWN_WARNINGS = (
    "In CPU autocast, but the target dtype is not supported",
    "LightningCLI's args parameter is intended",
    ".*treespec, LeafSpec.*",
    ".*`torch_dtype` is deprecated",
)

#: Logger and prefix of messages in which libraries recommend other packages.
ADVERTISEMENTS = (("lightning.pytorch.utilities.rank_zero", "💡 Tip:"),)

#: Commands that parse their own arguments, with LightningCLI or with the options of a benchmark.
RAW = ("study", "plan", "fit", "validate", "submit", "bench")


def check_packages() -> None:
    """Raises ValueError if another installed package has the name of one of ours."""
    home = Path(__file__).resolve().parent.parent
    for name in ("trainer", "data"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve().parent if spec and spec.origin else None
        if found != home / name:
            raise ValueError(
                f"got package {name!r} from {found}, expected {home / name}: another package of that name comes first. "
                "Uninstall it, clear PYTHONPATH, or install reblock into a virtual environment of its own."
            )


def quieten_libraries() -> None:
    """Hides output of libraries: known warnings, advertisements, progress bars of loaders."""
    # Set before the import of transformers, which reads it.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, start in ADVERTISEMENTS:
        logging.getLogger(logger).addFilter(partial(_is_no_advertisement, start))


def _is_no_advertisement(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def _import_for_good(module: str) -> ModuleType:
    """Imports a command's module, whose objects are then left out of garbage collection until the process ends.

    With torch and Lightning they are more than half a million. Visiting them during the import, in each full
    collection of the command and at the interpreter's end takes a quarter of the time of a short command.
    """
    atexit.register(_mute_leak_reports)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _mute_leak_reports() -> None:
    """Closes stderr as the last of the handlers at exit.

    After them triton's bindings take the objects that are left out of garbage collection for leaks, and print fifty
    lines about it.
    """
    if "triton" in sys.modules:
        sys.stderr.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def call(command: str, function: Callable, argv: list[str]) -> Any:
    """Calls `function` with arguments from `argv`; its keyword-only arguments are options, the others positional.

    Arguments of a function with `*names` are one or more words; their type is that of one of them.

    `--config FILE` reads options from YAML; later options on the command line override it. A switch needs no value,
    `--verify` means `--verify true`, and any option may be spelled with hyphens.
    """
    from launch.command_parser import CommandParser  # imported late, since jsonargparse is slow to import

    parameters = inspect.signature(function).parameters.values()
    # str | int is the type of jsonargparse's `skip`
    names: set[str | int] = {p.name for p in parameters}
    several = next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None)
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is p.empty}
    parser = CommandParser(prog=f"reblock {command}", description=(inspect.getdoc(function) or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=names - positional)
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=positional)
    if several is not None:
        parser.add_argument(several.name, nargs="+", type=several.annotation)
    switches = {f"--{p.name}" for p in parameters if isinstance(p.default, bool)}
    given = parser.instantiate_classes(parser.parse_args(spelled_out(argv, switches)))
    given.pop("config")
    return function(*(given.pop(several.name) if several else ()), **given)


def spelled_out(argv: Sequence[str], switches: Collection[str]) -> list[str]:
    """Rewrites arguments for the parser: `--allow-pipe` becomes `--allow_pipe=true` if it is one of `switches`."""
    words = []
    for word, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            if name in switches and not equals and following.lower() not in ("true", "false", "yes", "no"):
                equals, value = "=", "true"
        words.append(f"{name}{equals}{value}")
    return words


def usage() -> str:
    """What `reblock --help` prints."""
    lines = [f"  {name:<13} {text}" for name, (_, text) in COMMANDS.items()]
    return "usage: reblock COMMAND [ARGUMENTS]\n\n" + "\n".join(lines) + "\n\n`reblock COMMAND --help` says more."


def main(argv: list[str] | None = None) -> None:
    """Runs one command. Errors that a user can mend (input, paths, disks) exit with status 2; others propagate."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "--version":
        from importlib.metadata import version  # imported late, since it is slow

        return print(f"reblock {version('reblock')}")
    if command in ("-h", "--help"):
        return print(usage())
    try:
        if argv is None:  # in a process of its own; done first, since torch takes seconds to import
            signals.block_signals(command)
            # OpenMP reads this when torch is loaded. By default a waiting thread spins, and so may keep other work
            # from its core. The number of threads does not change, and therefore neither do the results of sums.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        quieten_libraries()
        check_packages()
        if command not in COMMANDS:
            raise ValueError(f"got command {command!r}, expected one of: {', '.join(COMMANDS)}.")
        module, name = COMMANDS[command][0].split(":")
        imported = importlib.import_module(module) if argv is not None else _import_for_good(module)
        function = getattr(imported, name)
        function([command, *rest]) if command in RAW else call(command, function, rest)
    except (ValueError, OSError) as error:
        if os.environ.get("REBLOCK_TRACEBACK") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped.", file=sys.stderr)
        sys.exit(signals.status_of_interrupt())


if __name__ == "__main__":
    # Imported as the console script does, since Python shows deprecation warnings of code in `__main__`.
    importlib.import_module("launch.main").main()
