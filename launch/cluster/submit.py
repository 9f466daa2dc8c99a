"""`reblock submit`: submits a recipe as Slurm jobs, after it has checked everything."""

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from launch import slurm
from launch.cluster import checks
from launch.cluster.batch_script import BatchScript, render
from launch.cluster.job_folder import note_job, noted_jobs, write_folder
from launch.cluster.options import JobConfig
from launch.cluster.stage_scripts import Submission, make_scripts
from launch.fit.cli import ReadingCLI, recipe_cli
from launch.run_config import RunConfig, refuse_taken
from launch.run_folder import RunFolder
from launch.versions import versions

_OPTIONS = tuple(option.name for option in fields(JobConfig))


class SubmitCLI(ReadingCLI):
    """Reads the recipe and the job's options; builds the Trainer for one CPU, since a log-in node has no GPU."""

    trainer_fault: str | None = None

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_class_arguments(JobConfig)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        # A log-in node has no GPU and no other ranks; launch.cluster.checks covers these settings.
        here = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "strategy": "auto", "precision": "32-true"}
        try:
            return super().instantiate_trainer(**here, **kwargs)
        except (MisconfigurationException, ValueError) as error:
            self.trainer_fault = str(error)
            return None  # type: ignore[return-value]

    @property
    def options(self) -> JobConfig:
        """The job's options, which are not part of the recipe."""
        return JobConfig(**{name: self.objects[name] for name in _OPTIONS})

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe in the form for `reblock fit --config`."""
        return {key: value for key, value in super().recipe.items() if key not in _OPTIONS}


def run(argv: list[str]) -> None:
    """Runs `submit` with its options.

    Raises:
        ValueError: if anything is wrong; names every fault, and nothing is written or queued.
    """
    if {"-h", "--help"} & set(argv):
        return print(_help())
    cli = _read(argv[1:])
    options, recipe, settings = cli.options, cli.recipe, cli.run_config
    found = versions()
    submission, faults = _submission(options, recipe, settings, found)
    faults += [*options.faults(), *checks.name_faults(settings), *_folder_faults(settings, submission)]
    faults += [cli.trainer_fault] if cli.trainer_fault else []
    memory = None
    if not options.faults():
        callbacks = cli.objects.trainer.get("callbacks") or []
        faults += checks.layout_faults(submission)
        faults += checks.content_faults(submission, cli.model, cli.datamodule, callbacks)
        if not faults:  # otherwise it would report the same faults again
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "recipe.yaml"
                path.write_text(_text(submission))
                faults, memory = checks.memory_faults(submission, path)
        faults += checks.cluster_faults(submission)
    if options.dry_run:
        if not checks.name_faults(settings) and not options.faults():
            _show(submission, memory)
    elif not slurm.at_hand():
        faults.append("sbatch is not here; expected a log-in node of a Slurm cluster. --dry-run shows the script.")
    if faults:
        raise ValueError("\n".join(["this cannot run as it is:", *(f"  - {line}" for line in dict.fromkeys(faults))]))
    if memory and not options.dry_run:
        print(f"memory: {memory}")
    if not options.dry_run:
        _submit(submission, make_scripts(submission), found)


def _read(argv: Sequence[str]) -> SubmitCLI:
    """Reads recipe and options. Hides Lightning's messages about this machine, since the job runs on other nodes."""
    log = logging.getLogger("lightning.pytorch")
    level = log.level
    log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The `srun` command is available")
            return recipe_cli(_spelled(argv), run=False, kind=SubmitCLI)
    except MisconfigurationException as error:  # Lightning raises it for an invalid strategy
        raise ValueError(str(error)) from error
    finally:
        log.setLevel(level)


def _submission(
    options: JobConfig, recipe: dict[str, Any], settings: RunConfig, found: dict[str, Any]
) -> tuple[Submission, list[str]]:
    """Builds the submission and writes its nodes and devices into the recipe; returns it with the faults found."""
    trainer, faults = recipe["trainer"], []
    devices, accelerator = trainer.get("devices"), trainer.get("accelerator")
    if isinstance(devices, list):
        devices = len(devices)
    if options.gpus_per_node:
        devices = options.gpus_per_node
    elif not (isinstance(devices, int | str) and str(devices).isdigit() and int(devices) > 0):
        faults.append(f"got trainer.devices {devices!r}, expected how many a node has; or say --gpus_per_node.")
        devices = 1
    if accelerator not in ("gpu", "cuda", "cpu") and not options.gpus_per_node:
        faults.append(f"got trainer.accelerator {accelerator!r}, expected gpu or cpu; or say --gpus_per_node.")
    nodes = options.nodes or trainer.get("num_nodes") or 1
    trainer |= {"num_nodes": nodes, "devices": int(devices)}
    submission = Submission(
        options=options, recipe=recipe, run=RunFolder(Path(os.path.abspath(settings.folder.path))), here=Path.cwd(),
        nodes=nodes, devices=int(devices),
        gpus=int(devices) if options.gpus_per_node or accelerator in ("gpu", "cuda") else None,
        versions=_in_one_line(found), written=f"{datetime.now():%F %H:%M}", node_timeout=slurm.node_timeout(),
    )  # fmt: skip
    return submission, faults


def _in_one_line(found: dict[str, Any]) -> str:
    packages = found["packages"]
    names = ", ".join(f"{name} {packages[name]}" for name in ("torch", "lightning", "diffusers"))
    return f"python {found['python']}, {names}, reblock {_commit(found['git'])}"


def _commit(git: str | None) -> str:
    commit, changed, _ = (git or "of no commit").partition("+")
    return commit[:12] + (" with changes" if changed else "")


def _folder_faults(settings: RunConfig, submission: Submission) -> list[str]:
    """Faults of the run folder: it exists and `resume` is off, or a job of the run is still queued."""
    try:
        refuse_taken(settings)
    except ValueError as error:
        return [str(error)]
    return [
        f"job {entry['job']} ({entry['stage']}) of this run is {state}, expected none: both would write to one folder. "
        f"Wait for it, or end it: scancel {entry['job']}."
        for entry in noted_jobs(submission.run)
        if (state := slurm.unfinished(entry["job"]))
    ]


def _text(submission: Submission) -> str:
    return yaml.safe_dump(submission.recipe, sort_keys=False, allow_unicode=True)


def _show(submission: Submission, memory: str | None) -> None:
    """Prints the scripts and the sbatch commands of a dry run."""
    before, calls = list(submission.options.after_list), []
    for script in make_scripts(submission):
        print(render(script), end="\n")
        waits = f"{slurm.dependency(before, alone=script.ranks)} " if before else ""
        calls.append(f"# dry run: sbatch {waits}{script.path}")
        before = [f"<{script.stage}'s id>"]
    print("\n".join(calls if memory is None else [f"# memory: {memory}", *calls]))


def _submit(submission: Submission, scripts: Sequence[BatchScript], found: dict[str, Any]) -> None:
    """Writes the folder and queues the scripts, each after the one before it; if one fails, cancels the others."""
    write_folder(submission, _text(submission), scripts, found)
    after, queued = list(submission.options.after_list), list[str]()
    for script in scripts:
        try:
            number = slurm.submit(script.path, after, alone=script.ranks)
        except ValueError as error:
            slurm.cancel(queued)
            kept = f" The jobs before it were taken back: {', '.join(queued)}." if queued else ""
            raise ValueError(
                f"{error}.{kept} {submission.run.path} stays as it is; go on with --run.resume true."
            ) from error
        note_job(submission.run, script.stage, number, after, submission.nodes if script.ranks else 1)
        waits = f", waits for {', '.join(after)}" if after else ""
        print(f"job {number}: {script.title}{waits}")
        queued.append(number)
        after = [number]
    again = "fit" if "fit" in submission.options.stage_list else submission.options.stage_list[-1]
    print(
        f"run folder: {submission.run.path}\n"
        f"look:       reblock status {submission.run.path}\n"
        f"follow:     tail -F {submission.run.logs}/*\n"
        f"end:        scancel {' '.join(queued)}; go on: sbatch {submission.run.script(again)}"
    )


def _spelled(argv: Sequence[str]) -> list[str]:
    """Rewrites options for the parser: `--dry-run` as `--dry_run=true`, `--cpus-per-task` as `--cpus_per_task`."""
    found: list[str] = []
    for position, word in enumerate(argv):
        name, equals, value = word.partition("=")
        option = name.removeprefix("--").replace("-", "_")
        if name.startswith("--") and option in _OPTIONS:
            word = f"--{option}{equals}{value}"
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            if not equals and option in ("dry_run", "exclusive") and following.lower() not in ("true", "false"):
                word += "=true"
        found.append(word)
    return found


def _help() -> str:
    parser = ArgumentParser(
        prog="reblock submit",
        description="A recipe as a Slurm job. Beside these options it takes all of `reblock fit`: --config (several "
        "merge; they may hold these options too), --run.name, --model..., --data..., --trainer....",
    )
    parser.add_class_arguments(JobConfig)
    return parser.format_help()
