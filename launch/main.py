"""The `reblock` command: finds the function behind a command's name, reads its arguments, calls it."""

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
from typing import Any

from launch import signals

#: Command -> where its function is, and what it does in one line. Modules are imported only when asked for.
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
    "bench": ("launch.bench.command:run", "the benchmarks"),
    "demo": ("launch.demo.command:demo", "the whole road on a tiny model, in minutes"),
}

#: Warnings of libraries that are known, harmless and repeated: they would hide what matters.
KNOWN_WARNINGS = (
    "In CPU autocast, but the target dtype is not supported",
    "LightningCLI's args parameter is intended",
    ".*treespec, LeafSpec.*",
    ".*`torch_dtype` is deprecated",
)

#: Logger and beginning of messages by which libraries recommend other packages.
ADVERTISEMENTS = (("lightning.pytorch.utilities.rank_zero", "💡 Tip:"),)

#: Commands that read their own arguments (LightningCLI; a benchmark has options of its own).
RAW = ("plan", "fit", "validate", "submit", "bench")


def check_packages() -> None:
    """Raises ValueError if another installed package has taken the name of one of ours."""
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
    """Hides what libraries print beside our own lines: known warnings, advertisements, progress bars of loaders."""
    # transformers reads it when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for message in KNOWN_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, start in ADVERTISEMENTS:
        logging.getLogger(logger).addFilter(partial(_is_no_advertisement, start))


def _is_no_advertisement(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


def call(command: str, function: Callable, argv: list[str]) -> Any:
    """Calls `function` with its arguments read from `argv`: positional ones as they stand, keyword-only as options.

    `--config FILE` reads options from YAML; what stands behind it on the command line wins. A switch may stand alone,
    `--verify` for `--verify true`, and any option may be spelled with hyphens.
    """
    from launch.command_parser import CommandParser  # jsonargparse takes longer than everything else here

    parameters = inspect.signature(function).parameters.values()
    # str | int is what jsonargparse's `skip` takes
    names: set[str | int] = {p.name for p in parameters}
    positional: set[str | int] = {p.name for p in parameters if p.kind is not p.KEYWORD_ONLY and p.default is p.empty}
    parser = CommandParser(prog=f"reblock {command}", description=(inspect.getdoc(function) or "").split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file of options")
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=names - positional)
    parser.add_function_arguments(function, as_group=False, as_positional=False, skip=positional)
    switches = {f"--{p.name}" for p in parameters if isinstance(p.default, bool)}
    given = parser.instantiate_classes(parser.parse_args(spelled_out(argv, switches)))
    given.pop("config")
    return function(**given)


def spelled_out(argv: Sequence[str], switches: Collection[str]) -> list[str]:
    """Arguments as the parser takes them: `--allow-pipe` becomes `--allow_pipe=true` if it is one of `switches`."""
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
    """Runs one command; bad input, paths and disks are the user's to mend and exit with 2; faults of ours propagate."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command == "--version":
        from importlib.metadata import version  # takes longer than everything else here

        return print(f"reblock {version('reblock')}")
    if command in ("-h", "--help"):
        return print(usage())
    try:
        if argv is None:  # the process is ours: first of all, since torch takes seconds to import
            signals.block_signals(command)
            # Read when torch is loaded. By default a thread spins while it waits for another, which on a machine with
            # other work keeps that other one from its core. The number of threads, hence every sum, stays as it is.
            os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        quieten_libraries()
        check_packages()
        if command not in COMMANDS:
            raise ValueError(f"got command {command!r}, expected one of: {', '.join(COMMANDS)}.")
        module, name = COMMANDS[command][0].split(":")
        function = getattr(importlib.import_module(module), name)
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
    # As the console script does: deprecation warnings are shown for code in `__main__`, to its author.
    importlib.import_module("launch.main").main()
