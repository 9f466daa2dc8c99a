"""Checks recipe, options and cluster against each other, before anything is written or queued.

Each function returns one line per fault, and raises nothing for faults that a user can mend.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from data.base_facts import read_base
from data.base_folder import resolve_base
from data.bucket import Bucket
from data.modules.shard_module import ShardDataModule
from data.shards.format import LATENT_FORMAT, VIDEO_FORMAT
from data.storage.store import Store
from data.stream.order import rank_size
from data.stream.shard_index import find_shards
from launch import slurm
from launch.cluster.options import control_faults, has_control, raw_options, seconds
from launch.cluster.stage_scripts import Submission, usual_command
from launch.fit.checks import check_fit
from launch.plan import estimate
from launch.run_config import RunConfig

#: Job names for which Lightning assumes an interactive shell and starts no ranks.
_INTERACTIVE = ("bash", "interactive")
_ONE_DEVICE = ("single_device", "single_xla")
_ONE_NODE = ("ddp_spawn", "ddp_fork", "ddp_notebook")


def name_faults(run: RunConfig) -> list[str]:
    """Faults of the run's name and folder, as a job's name and as text in a script."""
    found = control_faults({"run.name": run.name, "run.root": run.root, "the current folder": str(Path.cwd())})
    if run.name in _INTERACTIVE:
        found.append(
            f"got run.name {run.name!r}, expected another: Lightning takes a job of that name for an interactive one."
        )
    return found


def layout_faults(submission: Submission) -> list[str]:
    """Faults of nodes and devices with the recipe's strategy."""
    trainer, found = submission.recipe["trainer"], []
    strategy = trainer.get("strategy", "auto")
    name = strategy if isinstance(strategy, str) else strategy.get("class_path", "").rpartition(".")[2]
    if submission.ranks > 1 and (name in _ONE_DEVICE or name.startswith("SingleDevice")):
        found.append(
            f"got strategy {name} on {submission.ranks} ranks, expected one for several: ddp, or a cluster overlay."
        )
    if name in _ONE_NODE:
        found.append(f"got strategy {name}, expected one whose ranks Slurm starts: ddp, or a cluster overlay.")
    if trainer.get("accelerator") == "cpu" and submission.options.gpus_per_node:
        found.append("got gpus_per_node for a recipe with trainer.accelerator cpu; leave one of them out.")
    return found


def content_faults(
    submission: Submission, model: LightningModule, data: LightningDataModule, callbacks: Sequence[Callback]
) -> list[str]:
    """Faults of base, shards, batches and probes, as `reblock fit` finds them; for the stage encode, of its sources."""
    found, stages = [], submission.options.stage_list
    if "encode" in stages:
        found += _encode_faults(submission)
    if "fit" in stages:
        # The batch first: it needs no shards, while `check_fit` checks it only after the shards are found valid.
        if isinstance(data, ShardDataModule) and data.config.global_batch_size is not None:
            size = data.config.global_batch_size
            found += _lines(lambda: rank_size(size, submission.ranks))
        if "encode" in stages:
            found += _lines(getattr(model, "check", lambda: None))
            validation = data.config.val_shards if isinstance(data, ShardDataModule) else None
            if validation is not None:
                found += _lines(lambda: find_shards(validation, LATENT_FORMAT, Store()))
        else:
            found += _lines(lambda: check_fit(model, data, ranks=submission.ranks, callbacks=callbacks))
    return found


def _encode_faults(submission: Submission) -> list[str]:
    source, latents = submission.options.encode.shards, submission.recipe["data"]["init_args"].get("shards")
    found = []
    if source is None:
        found.append("got no encode.shards for the stage encode, expected a folder of video shards (`reblock pack`).")
    else:
        found += _lines(lambda: find_shards([source], VIDEO_FORMAT, Store()))
    several = isinstance(latents, list) and len(latents) != 1
    pattern = any(mark in submission.latents for mark in ("*", "?", "{", "://"))
    if several or pattern or submission.latents.endswith(".tar"):
        found.append(f"got data.shards {latents!r}, expected the one local folder that the stage encode writes.")
    if has_control(submission.latents):
        found.append(f"got data.shards {submission.latents!r}, expected text without line breaks.")
    base = submission.recipe["model"]["init_args"].get("base")
    return found + _lines(lambda: read_base(resolve_base(str(base))))


def _lines(check: Any) -> list[str]:
    try:
        check()
    except (ValueError, OSError) as error:
        return str(error).splitlines()
    return []


def cluster_faults(submission: Submission) -> list[str]:
    """Faults of the options with Slurm's partitions; skips the partitions if Slurm does not answer."""
    options, found = submission.options, []
    if options.container_image and slurm.has_pyxis() is False:
        found.append(
            "got container_image, but this Slurm's srun has no --container-image (pyxis); try apptainer_image."
        )
    elsewhere = options.command or options.container_image or options.apptainer_image
    if not elsewhere and not Path(usual_command()).is_file():
        found.append(f"{usual_command()} does not exist; say with --command how the nodes call reblock.")
    known = slurm.partitions()
    for stage in options.stage_list if known else []:
        found += [line for line in _partition_faults(submission, stage, known or []) if line not in found]
    return found


@dataclass(frozen=True)
class _Requirements:
    """Resources that a stage requests from a partition; tasks and GPUs are per node."""

    nodes: int
    tasks: int
    cpus_per_task: int
    gpus: int | None
    time: str | int | None


def _requirements(submission: Submission, stage: str, own: Mapping[str, str | None]) -> _Requirements:
    cpus, time = submission.options.cpus_per_task or 1, own.get("time", submission.options.time)
    if stage == "fit":
        return _Requirements(submission.nodes, submission.devices, cpus, submission.gpus, time)
    if stage == "encode" and submission.gpus:
        return _Requirements(1, 1, cpus, 1, time)
    return _Requirements(1, 1, 1, None, time)


def _partition_faults(submission: Submission, stage: str, known: Sequence[slurm.Partition]) -> list[str]:
    """Faults of a stage if none of its possible partitions can run it."""
    options = submission.options
    own = raw_options([*options.slurm, *(getattr(options, stage).slurm if stage != "fit" else [])])
    # sbatch prefers the environment variable to the script's option.
    named = os.environ.get("SBATCH_PARTITION") or own.get("partition") or options.partition
    every = ", ".join(partition.name for partition in known)
    if named is None:
        chosen = [partition for partition in known if partition.default]
        if not chosen:
            return [f"got no partition and the cluster has no default; name one of: {every}."]
    else:
        names = named.split(",")
        chosen = [partition for partition in known if partition.name in names]
        absent = sorted(set(names) - {partition.name for partition in chosen})
        if absent:
            return [f"got partition {', '.join(absent)}, expected one of: {every}."]
    refusals = [_refusal(_requirements(submission, stage, own), partition) for partition in chosen]
    return [] if None in refusals else [text for text in refusals if text]


def _refusal(required: _Requirements, partition: slurm.Partition) -> str | None:
    """Reason why a partition cannot provide the resources, or None."""
    against = []
    if required.nodes > partition.nodes:
        against.append(f"{required.nodes} nodes of {partition.nodes}")
    if required.tasks * required.cpus_per_task > partition.cpus:
        against.append(f"{required.tasks} tasks x {required.cpus_per_task} CPUs on a node of {partition.cpus}")
    if required.gpus and partition.gpus is not None and required.gpus > partition.gpus:
        against.append(f"{required.gpus} GPUs on a node of {partition.gpus}")
    if required.gpus and partition.gpus is None:
        against.append("GPUs of nodes that list none")
    limit = None if required.time is None else seconds(str(required.time))
    most = seconds(partition.max_time)
    if required.time is not None and most is not None and (limit is None or limit > most):
        against.append(f"a time of {required.time} where {partition.max_time} is the most")
    if not against:
        return None
    return f"partition {partition.name} cannot give what is asked: {'; '.join(against)}. Ask for less, or another one."


def memory_faults(submission: Submission, recipe: Path) -> tuple[list[str], str | None]:
    """Compares the estimate of `reblock plan` with a GPU's memory.

    Args:
        submission: the submission.
        recipe: path of the resolved recipe.

    Returns:
        Faults, and the estimate as text; None without an estimate.
    """
    if not submission.gpus or "fit" not in submission.options.stage_list:
        return [], None
    try:
        found = estimate(["--config", str(recipe), *_clip_size(submission)], submission.nodes)
    except (ValueError, OSError) as error:
        return str(error).splitlines(), None
    required = found.bytes_per_gpu / 2**30
    said = f"{required:.1f} GiB of {submission.options.gpu_memory:g} GiB on each GPU with strategy {found.strategy}"
    if required <= submission.options.gpu_memory:
        return [], said
    return [
        f"the run would need {said}. See `reblock plan`; take another strategy (recipes/cluster), checkpoint_head, a "
        "smaller batch, or GPUs with more memory (--gpu_memory)."
    ], said


def _clip_size(submission: Submission) -> list[str]:
    """Options for the size of the largest clip in the video shards, if the stage encode will write the latents."""
    if "encode" not in submission.options.stage_list:
        return []
    sources = find_shards([str(submission.options.encode.shards)], VIDEO_FORMAT, Store())
    buckets = [
        Bucket.parse(entry["bucket"], source.family.name) for source in sources for entry in source.index["shards"]
    ]
    largest = max(buckets, key=lambda b: b.frames * b.height * b.width)
    return [f"--frames={largest.frames}", f"--height={largest.height}", f"--width={largest.width}"]
