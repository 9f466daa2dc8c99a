"""Builds the script of each stage from a recipe and `JobConfig`: its Slurm options and its command."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.batch_script import BatchScript, DirectiveGroup, Line, file_pattern
from launch.cluster.options import JobConfig, raw_options
from launch.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Submission:
    """Inputs of the scripts.

    Args:
        options: options of the command line.
        recipe: the resolved recipe.
        run: the run folder with an absolute path.
        here: absolute path of the current folder, which relative paths of the recipe refer to.
        nodes: number of nodes of the fit.
        devices: devices per node, with one task each.
        gpus: GPUs per node to request from Slurm, or None.
        versions: versions of the submitted software in one line.
        written: date and time of the submission.
        node_timeout: seconds after which Slurm marks an unresponsive node as down.
    """

    options: JobConfig
    recipe: dict[str, Any]
    run: RunFolder
    here: Path
    nodes: int
    devices: int
    gpus: int | None
    versions: str
    written: str
    node_timeout: int = 300

    @property
    def wait_seconds(self) -> int:
        """Seconds that other tasks may run after one has ended.

        If a node dies, ranks on other nodes soon fail. If Slurm ended the job at once, the job would fail before Slurm
        marks the node as down, and would not be requeued.
        """
        return self.options.wait_seconds or 2 * self.node_timeout + 60

    @property
    def ranks(self) -> int:
        """Number of training processes."""
        return self.nodes * self.devices

    @property
    def name(self) -> str:
        """Name of the run and of its job."""
        return self.run.path.name

    @property
    def latents(self) -> str:
        """Folder in which the recipe expects the latents of the stage encode."""
        shards = self.recipe["data"]["init_args"]["shards"]
        return str(shards[0] if isinstance(shards, list) else shards)


def make_scripts(submission: Submission) -> list[BatchScript]:
    """Builds the scripts of the requested stages."""
    makers = {"encode": _encode, "fit": _fit, "export": _export}
    return [makers[stage](submission) for stage in submission.options.stage_list]


def _fit(submission: Submission) -> BatchScript:
    options = submission.options
    gpus = f" x {submission.gpus} GPUs" if submission.gpus else f" x {submission.devices} tasks"
    size: list[Line] = [
        ("nodes", str(submission.nodes)),
        "One task for each device: Lightning takes its ranks from Slurm, and needs just this option for it.",
        ("ntasks-per-node", str(submission.devices)),
        *_options(("gpus-per-node", submission.gpus)),
    ]
    ends: list[Line] = [
        f"{options.signal} goes to the tasks {options.signal_seconds} s before the time limit (Slurm may send it up to "
        "a minute earlier).",
        ("signal", f"{options.signal}@{options.signal_seconds}"),
        *_requeue(options),
        "Never two fits in one run folder: a job waits for the others of its name.",
        ("dependency", "singleton"),
    ]
    return _script(
        submission,
        "fit",
        title=f"{submission.name}: reblock fit on {submission.nodes} nodes{gpus} = {submission.ranks} ranks",
        by_hand=[
            "To submit it again by hand; the run goes on from its last checkpoint, if it has one:",
            f"    sbatch {shlex.quote(str(submission.run.script('fit')))}",
            "With other nodes: `sbatch --nodes=4 ...`. A global batch (data.global_batch_size) stays what it is.",
        ],
        size=size, ends=ends, slurm=[], ranks=True,
        srun=["--kill-on-bad-exit=0", f"--wait={submission.wait_seconds}"], stops="save at the end of this step",
        verb="the fit; it goes on from the last checkpoint, where there is one",
        command=[
            _line(*_reblock(submission), "fit", "--config", str(submission.run.job_config)),
            "--run.resume true",
            '--trainer.num_nodes "$SLURM_JOB_NUM_NODES"',
            '--trainer.devices "$SLURM_NTASKS_PER_NODE"',
        ],
    )  # fmt: skip


def _encode(submission: Submission) -> BatchScript:
    options, stage = submission.options, submission.options.encode
    array = f"0-{stage.tasks - 1}" + (f"%{stage.at_once}" if stage.at_once else "")
    gpus = 1 if submission.gpus else None
    return _script(
        submission,
        "encode",
        title=f"{submission.name}: reblock encode, an array of {stage.tasks} tasks that share the shards among them",
        by_hand=[
            "To submit it again by hand; finished shards are kept, and so are the claims of tasks that still run:",
            f"    sbatch {shlex.quote(str(submission.run.script('encode')))}",
        ],
        size=[
            "Each task takes the next shard that nobody has claimed, so any number of them will do.",
            ("array", array), ("nodes", "1"), ("ntasks-per-node", "1"), *_options(("gpus-per-node", gpus)),
        ],
        ends=[
            f"{options.signal} goes to the task a minute before the time limit: it gives up the shard that it is at.",
            ("signal", f"{options.signal}@60"), *_requeue(options),
        ],
        slurm=stage.slurm, ranks=False, srun=[], verb="encode", stops="give up the shard under way",
        command=[
            _line(*_reblock(submission), "encode", str(stage.shards), submission.latents),
            _line("--base", str(submission.recipe["model"]["init_args"]["base"])),
            *map(_line, stage.options),
        ],
    )  # fmt: skip


def _export(submission: Submission) -> BatchScript:
    options, stage = submission.options, submission.options.export
    return _script(
        submission,
        "export",
        title=f"{submission.name}: reblock export, the retrained blocks on their base as a pipeline folder",
        by_hand=["To submit it again by hand:", f"    sbatch {shlex.quote(str(submission.run.script('export')))}"],
        size=[("nodes", "1"), ("ntasks-per-node", "1")],
        ends=_requeue(options),
        slurm=stage.slurm, ranks=False, srun=[], verb="export",
        command=[
            _line(*_reblock(submission), "export", str(submission.run.path), stage.out or str(submission.run.pipeline)),
            *map(_line, stage.options),
        ],
    )  # fmt: skip


def _script(
    submission: Submission, stage: str, *, title: str, by_hand: Sequence[str], size: Sequence[Line],
    ends: Sequence[Line], slurm: Sequence[str], ranks: bool, srun: Sequence[str], verb: str, command: Sequence[str],
    stops: str = "",
) -> BatchScript:  # fmt: skip
    """Builds a script from the parts that all stages share; raw options override the others."""
    options, own = submission.options, raw_options([*submission.options.slurm, *slurm])
    number = "%A_%a" if stage == "encode" else "%j"
    logs = file_pattern(str(submission.run.logs))
    where: list[Line] = [
        ("job-name", submission.name if stage == "fit" else f"{submission.name}-{stage}"),
        *_options(
            ("partition", options.partition), ("account", options.account), ("qos", options.qos),
            ("reservation", options.reservation), ("constraint", options.constraint), ("exclude", options.exclude),
        ),
    ]  # fmt: skip
    amount = [
        *size,
        *_options(("cpus-per-task", options.cpus_per_task if stage != "export" else None), ("time", options.time)),
        *(_options(("mem", options.mem)) if stage == "fit" else []),
        *([("exclusive", None)] if options.exclusive and stage == "fit" else []),
    ]
    files: list[Line] = [
        "Relative paths of the recipe start here.",
        ("chdir", str(submission.here)),
        "This script's own lines; a requeued job goes on in the same file.",
        ("output", f"{logs}/%x-{number}.log"),
        ("open-mode", "append"),
    ]
    # One log for each task and each start, so that a requeue does not overwrite earlier output.
    task_log = f'--output={shlex.quote(logs)}/%x-{number}-r"$restarts"-%t.log'
    groups = [
        DirectiveGroup(title="who and where", lines=_without(where, own)),
        DirectiveGroup(title="how much", lines=_without(amount, own)),
        DirectiveGroup(title="how it ends and comes back", lines=_without(ends, own)),
        DirectiveGroup(title="files", lines=files),
        *([DirectiveGroup(title="as given", lines=[*own.items()])] if own else []),
    ]
    return BatchScript(
        stage=stage, title=title, written=submission.written, versions=submission.versions, by_hand=by_hand,
        path=submission.run.script(stage), groups=groups, modules=options.modules, setup=options.setup, env=options.env,
        ranks=ranks, signal=options.signal,
        stops=stops, verb=verb,
        job_id='"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if stage == "encode" else "$SLURM_JOB_ID",
        max_requeues=options.max_requeues, wait_seconds=submission.wait_seconds, run=submission.run,
        srun=[*srun, task_log, *_pyxis(submission)], command=command,
    )  # fmt: skip


def _options(*given: tuple[str, object]) -> list[Line]:
    return [(name, str(value)) for name, value in given if value is not None]


def _without(lines: Sequence[Line], own: dict[str, str | None]) -> list[Line]:
    # A raw option may request GPUs instead: some clusters require --gres.
    gone = {*own, *(("gpus-per-node",) if own.keys() & {"gres", "gpus", "gpus-per-task"} else ())}
    return [line for line in lines if isinstance(line, str) or line[0] not in gone]


def _requeue(options: JobConfig) -> list[Line]:
    if not options.max_requeues:
        return ["It is not queued again, whatever happens (--max_requeues 0).", ("no-requeue", None)]
    return [
        "Slurm queues it again when a node fails or is taken away, and this script when it was stopped in time.",
        ("requeue", None),
    ]


def _reblock(submission: Submission) -> list[str]:
    """Words of the command that runs reblock on the nodes."""
    options = submission.options
    inside = bool(options.container_image or options.apptainer_image)
    command = shlex.split(options.command) if options.command else ["reblock"] if inside else [usual_command()]
    if not options.apptainer_image:
        return command
    return [
        "apptainer", "exec", *(["--nv"] if submission.gpus else []), "--bind", _mounts(submission),
        "--pwd", str(submission.here), options.apptainer_image, *command,
    ]  # fmt: skip


def usual_command() -> str:
    """Full path of this installation's `reblock`."""
    return str(Path(sys.executable).with_name("reblock"))


def _pyxis(submission: Submission) -> list[str]:
    image = submission.options.container_image
    if not image:
        return []
    options = {"image": image, "mounts": _mounts(submission), "workdir": str(submission.here)}
    return [f"--container-{name}={shlex.quote(value)}" for name, value in options.items()]


def _mounts(submission: Submission) -> str:
    if submission.options.container_mounts:
        return submission.options.container_mounts
    data, model = submission.recipe["data"]["init_args"], submission.recipe["model"]["init_args"]
    listed = [data.get("shards"), data.get("val_shards"), submission.options.encode.shards, model.get("base")]
    named = [name for value in listed for name in (value if isinstance(value, list) else [value]) if name]
    # Names that are no paths, such as hub ids and URLs, do not exist. Paths with a colon or comma cannot be mounted.
    paths = [submission.run.path, *(path.absolute() for name in named if (path := Path(str(name))).exists())]
    folders = [
        submission.here,
        *(path if path.is_dir() or path == submission.run.path else path.parent for path in paths),
    ]
    apart = [folder for folder in dict.fromkeys(folders) if not any(o in folder.parents for o in folders)]
    apart = [folder for folder in apart if folder == submission.here or not {":", ","} & set(str(folder))]
    return ",".join(f"{folder}:{folder}" for folder in apart)


def _line(*words: str) -> str:
    return shlex.join(words)
