"""From a recipe and `JobConfig` to the scripts: what each stage asks of Slurm, and what it runs."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cluster.options import JobConfig, raw_options
from launch.cluster.script import Group, Job, Line, file_pattern
from launch.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the scripts are made from.

    Args:
        job: the options.
        recipe: the resolved recipe.
        run: the run folder, absolute.
        here: the current folder, absolute: what relative paths of the recipe start from.
        nodes: of the fit.
        devices: of a node, hence tasks of it.
        gpus: of a node that are asked of Slurm; None: none.
        versions: of what is submitted, in one line.
        written: when.
        node_timeout: seconds after which Slurm gives up a node that does not answer.
    """

    job: JobConfig
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
        """How long other tasks may go on when one has ended.

        Ranks of a node that has died leave the others with an error soon. Ended at once, the job would have failed
        before Slurm gives the node up, and not be queued again.
        """
        return self.job.wait_seconds or 2 * self.node_timeout + 60

    @property
    def ranks(self) -> int:
        """Processes that train together."""
        return self.nodes * self.devices

    @property
    def name(self) -> str:
        """The run's name, and the job's."""
        return self.run.path.name

    @property
    def latents(self) -> str:
        """Where the recipe expects the latents that the stage encode makes."""
        shards = self.recipe["data"]["init_args"]["shards"]
        return str(shards[0] if isinstance(shards, list) else shards)


def make_jobs(plan: Plan) -> list[Job]:
    """The scripts of the stages that are asked for."""
    makers = {"encode": _encode, "fit": _fit, "export": _export}
    return [makers[stage](plan) for stage in plan.job.stage_list]


def _fit(plan: Plan) -> Job:
    job = plan.job
    gpus = f" x {plan.gpus} GPUs" if plan.gpus else f" x {plan.devices} tasks"
    size: list[Line] = [
        ("nodes", str(plan.nodes)),
        "One task for each device: Lightning takes its ranks from Slurm, and needs just this option for it.",
        ("ntasks-per-node", str(plan.devices)),
        *_options(("gpus-per-node", plan.gpus)),
    ]
    ends: list[Line] = [
        f"{job.signal} goes to the tasks {job.signal_seconds} s before the time limit (Slurm may send it up to a minute"
        " earlier).",
        ("signal", f"{job.signal}@{job.signal_seconds}"),
        *_requeue(job),
        "Never two fits in one run folder: a job waits for the others of its name.",
        ("dependency", "singleton"),
    ]
    return _job(
        plan,
        "fit",
        title=f"{plan.name}: reblock fit on {plan.nodes} nodes{gpus} = {plan.ranks} ranks",
        by_hand=[
            "To submit it again by hand; the run goes on from its last checkpoint, if it has one:",
            f"    sbatch {shlex.quote(str(plan.run.script('fit')))}",
            "With other nodes: `sbatch --nodes=4 ...`. A global batch (data.global_batch_size) stays what it is.",
        ],
        size=size, ends=ends, slurm=[], ranks=True,
        srun=["--kill-on-bad-exit=0", f"--wait={plan.wait_seconds}"], stops="save at the end of this step",
        verb="the fit; it goes on from the last checkpoint, where there is one",
        command=[
            _line(*_reblock(plan), "fit", "--config", str(plan.run.job_config)),
            "--run.resume true",
            '--trainer.num_nodes "$SLURM_JOB_NUM_NODES"',
            '--trainer.devices "$SLURM_NTASKS_PER_NODE"',
        ],
    )  # fmt: skip


def _encode(plan: Plan) -> Job:
    job, stage = plan.job, plan.job.encode
    array = f"0-{stage.tasks - 1}" + (f"%{stage.at_once}" if stage.at_once else "")
    gpus = 1 if plan.gpus else None
    return _job(
        plan,
        "encode",
        title=f"{plan.name}: reblock encode, an array of {stage.tasks} tasks that share the shards among them",
        by_hand=[
            "To submit it again by hand; finished shards are kept, and so are the claims of tasks that still run:",
            f"    sbatch {shlex.quote(str(plan.run.script('encode')))}",
        ],
        size=[
            "Each task takes the next shard that nobody has claimed, so any number of them will do.",
            ("array", array), ("nodes", "1"), ("ntasks-per-node", "1"), *_options(("gpus-per-node", gpus)),
        ],
        ends=[
            f"{job.signal} goes to the task a minute before the time limit: it gives up the shard that it is at.",
            ("signal", f"{job.signal}@60"), *_requeue(job),
        ],
        slurm=stage.slurm, ranks=False, srun=[], verb="encode", stops="give up the shard under way",
        command=[
            _line(*_reblock(plan), "encode", str(stage.shards), plan.latents),
            _line("--base", str(plan.recipe["model"]["init_args"]["base"])),
            *map(_line, stage.options),
        ],
    )  # fmt: skip


def _export(plan: Plan) -> Job:
    job, stage = plan.job, plan.job.export
    return _job(
        plan,
        "export",
        title=f"{plan.name}: reblock export, the retrained blocks on their base as a pipeline folder",
        by_hand=["To submit it again by hand:", f"    sbatch {shlex.quote(str(plan.run.script('export')))}"],
        size=[("nodes", "1"), ("ntasks-per-node", "1")],
        ends=_requeue(job),
        slurm=stage.slurm, ranks=False, srun=[], verb="export",
        command=[
            _line(*_reblock(plan), "export", str(plan.run.path), stage.out or str(plan.run.pipeline)),
            *map(_line, stage.options),
        ],
    )  # fmt: skip


def _job(
    plan: Plan, stage: str, *, title: str, by_hand: Sequence[str], size: Sequence[Line], ends: Sequence[Line],
    slurm: Sequence[str], ranks: bool, srun: Sequence[str], verb: str, command: Sequence[str], stops: str = "",
) -> Job:  # fmt: skip
    """What all stages have in common; raw options win over the others."""
    job, own = plan.job, raw_options([*plan.job.slurm, *slurm])
    number = "%A_%a" if stage == "encode" else "%j"
    logs = file_pattern(str(plan.run.logs))
    where: list[Line] = [
        ("job-name", plan.name if stage == "fit" else f"{plan.name}-{stage}"),
        *_options(
            ("partition", job.partition), ("account", job.account), ("qos", job.qos), ("reservation", job.reservation),
            ("constraint", job.constraint), ("exclude", job.exclude),
        ),
    ]  # fmt: skip
    amount = [
        *size,
        *_options(("cpus-per-task", job.cpus_per_task if stage != "export" else None), ("time", job.time)),
        *(_options(("mem", job.mem)) if stage == "fit" else []),
        *([("exclusive", None)] if job.exclusive and stage == "fit" else []),
    ]
    files: list[Line] = [
        "Relative paths of the recipe start here.",
        ("chdir", str(plan.here)),
        "This script's own lines; a requeued job goes on in the same file.",
        ("output", f"{logs}/%x-{number}.log"),
        ("open-mode", "append"),
    ]
    # One log for each task and each start: what a rank said before a requeue is not written over.
    task_log = f'--output={shlex.quote(logs)}/%x-{number}-r"$restarts"-%t.log'
    groups = [
        Group(title="who and where", lines=_without(where, own)),
        Group(title="how much", lines=_without(amount, own)),
        Group(title="how it ends and comes back", lines=_without(ends, own)),
        Group(title="files", lines=files),
        *([Group(title="as given", lines=[*own.items()])] if own else []),
    ]
    return Job(
        stage=stage, title=title, written=plan.written, versions=plan.versions, by_hand=by_hand,
        path=plan.run.script(stage), groups=groups, modules=job.modules, setup=job.setup, env=job.env,
        ranks=ranks, signal=job.signal,
        stops=stops, verb=verb,
        job_id='"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if stage == "encode" else "$SLURM_JOB_ID",
        max_requeues=job.max_requeues, wait_seconds=plan.wait_seconds, run=plan.run,
        srun=[*srun, task_log, *_pyxis(plan)], command=command,
    )  # fmt: skip


def _options(*given: tuple[str, object]) -> list[Line]:
    return [(name, str(value)) for name, value in given if value is not None]


def _without(lines: Sequence[Line], own: dict[str, str | None]) -> list[Line]:
    # GPUs may be asked for in another way: some clusters want --gres.
    gone = {*own, *(("gpus-per-node",) if own.keys() & {"gres", "gpus", "gpus-per-task"} else ())}
    return [line for line in lines if isinstance(line, str) or line[0] not in gone]


def _requeue(job: JobConfig) -> list[Line]:
    if not job.max_requeues:
        return ["It is not queued again, whatever happens (--max_requeues 0).", ("no-requeue", None)]
    return [
        "Slurm queues it again when a node fails or is taken away, and this script when it was stopped in time.",
        ("requeue", None),
    ]


def _reblock(plan: Plan) -> list[str]:
    """How the nodes call reblock."""
    job = plan.job
    inside = bool(job.container_image or job.apptainer_image)
    command = shlex.split(job.command) if job.command else ["reblock"] if inside else [usual_command()]
    if not job.apptainer_image:
        return command
    return [
        "apptainer", "exec", *(["--nv"] if plan.gpus else []), "--bind", _mounts(plan), "--pwd", str(plan.here),
        job.apptainer_image, *command,
    ]  # fmt: skip


def usual_command() -> str:
    """The `reblock` of this installation, by its full path."""
    return str(Path(sys.executable).with_name("reblock"))


def _pyxis(plan: Plan) -> list[str]:
    image = plan.job.container_image
    if not image:
        return []
    options = {"image": image, "mounts": _mounts(plan), "workdir": str(plan.here)}
    return [f"--container-{name}={shlex.quote(value)}" for name, value in options.items()]


def _mounts(plan: Plan) -> str:
    if plan.job.container_mounts:
        return plan.job.container_mounts
    data, model = plan.recipe["data"]["init_args"], plan.recipe["model"]["init_args"]
    listed = [data.get("shards"), data.get("val_shards"), plan.job.encode.shards, model.get("base")]
    named = [name for value in listed for name in (value if isinstance(value, list) else [value]) if name]
    # What is no path, such as a hub id or a URL, does not exist; one with a colon or comma cannot be mounted so.
    paths = [plan.run.path, *(path.absolute() for name in named if (path := Path(str(name))).exists())]
    folders = [plan.here, *(path if path.is_dir() or path == plan.run.path else path.parent for path in paths)]
    apart = [folder for folder in dict.fromkeys(folders) if not any(o in folder.parents for o in folders)]
    apart = [folder for folder in apart if folder == plan.here or not {":", ","} & set(str(folder))]
    return ",".join(f"{folder}:{folder}" for folder in apart)


def _line(*words: str) -> str:
    return shlex.join(words)
