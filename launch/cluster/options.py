"""Options of `reblock submit` besides the recipe, and their checks."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.plan.hardware import GPU_GIB

#: Stages of a submission; each depends on the one before it.
STAGES = ("encode", "fit", "export")
SIGNALS = ("USR1", "USR2", "HUP", "CONT", "URG", "WINCH")

_RAW = re.compile(r"--([a-z][a-z0-9-]*)(?:=([^\x00-\x1f\x7f]*))?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MEMORY = re.compile(r"\d+[KMGT]?")
_AFTER = re.compile(r"\d+(_\d+)?")

#: Options of sbatch that the user must not give directly -> what to use instead.
_TAKEN = {
    "nodes": "--nodes",
    "ntasks": "trainer.devices: there is one task for each device",
    "ntasks-per-node": "trainer.devices: there is one task for each device",
    "gpus-per-node": "--gpus_per_node",
    "job-name": "--run.name",
    "chdir": "the folder in which you call reblock submit",
    "output": "--run.root: logs lie in the run folder",
    "error": "--run.root: logs lie in the run folder",
    "open-mode": "nothing: it must be append, or a requeue would empty the log",
    "requeue": "--max_requeues",
    "no-requeue": "--max_requeues 0",
    "signal": "--signal and --signal_seconds",
    "array": "--encode.tasks: a fit is one job, an array of fits would be as many in one run folder",
    "dependency": "--after",
    "wrap": "nothing: the script is what runs",
    "parsable": "nothing: it is set",
}


@dataclass(kw_only=True)
class EncodeStage:
    """The stage that encodes the recipe's latents: an array of jobs that divide the shards among them.

    Args:
        shards: location of the video shards, as for `reblock encode`.
        tasks: number of jobs in the array, each with one device.
        at_once: largest number of jobs that run at a time; None for all.
        options: more options of `reblock encode`, each as `--key=value`.
        slurm: more options of sbatch for this stage, e.g. --partition=small.
    """

    shards: str | None = None
    tasks: int = 4
    at_once: int | None = None
    options: list[str] = field(default_factory=lambda: ["--dtype=bfloat16"])
    slurm: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class ExportStage:
    """The stage that writes the pipeline folder, on one node without a GPU.

    Args:
        out: folder to write; None for `pipeline` in the run folder.
        options: more options of `reblock export`, each as `--key=value`.
        slurm: more options of sbatch for this stage, each as `--key=value` or `--key`.
    """

    out: str | None = None
    options: list[str] = field(default_factory=list)
    slurm: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class JobConfig:
    """Options for a recipe's run on a Slurm cluster. A `--config` file may hold them together with the recipe.

    Args:
        nodes: number of nodes; None takes the recipe's trainer.num_nodes.
        stages: stages to run, of encode, fit and export, separated by commas; each waits for the one before it.
        dry_run: print what would be submitted, but write and queue nothing.
        partition: partition, as for sbatch; several are separated by commas.
        account: account to charge, as for sbatch.
        qos: quality of service, as for sbatch.
        time: time limit, [D-]HH:MM:SS or minutes, as for sbatch. An unfinished run continues in a new allocation.
        gpus_per_node: GPUs per node, which replace the recipe's trainer.devices; None keeps those of a GPU recipe.
        cpus_per_task: CPUs for each device of fit and encode; None takes the cluster's default.
        mem: memory of a node of the fit, as for sbatch, e.g. 512G; 0 requests all of it.
        constraint: required features of the nodes, as for sbatch.
        exclude: nodes to avoid, as for sbatch.
        reservation: reservation to use, as for sbatch.
        exclusive: allow no other job on the nodes of the fit.
        slurm: more options of sbatch for every stage, each as `--key=value` or `--key`; they override those above.
        after: id of a job that must succeed before the first stage starts; several are separated by commas.
        signal: signal that announces the time limit; choose another if NCCL or a container uses it.
        signal_seconds: seconds from the signal to the time limit; enough for the longest step or measurement and a
            checkpoint.
        max_requeues: largest number of requeues by the script; 0 turns requeues off, those by Slurm too.
        wait_seconds: seconds that other tasks may run after one has ended, before Slurm kills them. None takes twice
            SlurmdTimeout and a minute, in which Slurm detects a dead node and requeues the job.
        modules: environment modules to load.
        setup: lines of shell that prepare the environment; the script holds them verbatim.
        env: environment variables of the tasks, such as NCCL's settings: {NCCL_SOCKET_IFNAME: ib0}.
        container_image: image or URI for pyxis (`srun --container-image`).
        apptainer_image: image for `apptainer exec --nv`.
        container_mounts: mounts for either image, FROM:TO separated by commas; None mounts the current folder, the
            run folder, and those of base and shards, each at the same path.
        command: command that runs `reblock` on the nodes; None takes this installation's, or `reblock` in a container.
        gpu_memory: memory of one GPU in GiB; the plan's estimate must fit into it.
        encode: options of the stage encode.
        export: options of the stage export.
    """

    nodes: int | None = None
    stages: str = "fit"
    dry_run: bool = False
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | int | None = None
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem: str | int | None = None
    constraint: str | None = None
    exclude: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    slurm: list[str] = field(default_factory=list)
    after: str | int | None = None
    signal: str = "USR1"
    signal_seconds: int = 600
    max_requeues: int = 100
    wait_seconds: int | None = None
    modules: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    env: dict[str, str | int] = field(default_factory=lambda: {"NCCL_DEBUG": "WARN"})
    container_image: str | None = None
    apptainer_image: str | None = None
    container_mounts: str | None = None
    command: str | None = None
    gpu_memory: float = GPU_GIB
    encode: EncodeStage = field(default_factory=EncodeStage)
    export: ExportStage = field(default_factory=ExportStage)

    @property
    def stage_list(self) -> list[str]:
        """The requested stages in order."""
        asked = [name.strip() for name in self.stages.split(",")]
        return [name for name in STAGES if name in asked]

    @property
    def after_list(self) -> list[str]:
        """Ids of the jobs to wait for."""
        return [] if self.after is None else [job.strip() for job in str(self.after).replace(":", ",").split(",")]

    def faults(self) -> list[str]:
        """Faults of these options by themselves, one line each."""
        return [*self._number_faults(), *self._word_faults(), *self._raw_faults(), *self._control_faults()]

    def _number_faults(self) -> list[str]:
        least = {"nodes": 1, "gpus_per_node": 1, "cpus_per_task": 1, "signal_seconds": 1, "max_requeues": 0}
        least |= {"wait_seconds": 1, "gpu_memory": 1}
        found = [
            f"got {name} {value}, expected at least {low}."
            for name, low in least.items()
            if (value := getattr(self, name)) is not None and value < low
        ]
        tasks, at_once = self.encode.tasks, self.encode.at_once
        if tasks < 1 or (at_once is not None and at_once < 1):
            found.append(f"got encode.tasks {tasks}, encode.at_once {at_once}; expected at least 1 of each.")
        if self.time is not None:
            if isinstance(self.time, int):
                return [*found, f"got time {self.time}: YAML reads 24:00:00 as a number; put the time into quotes."]
            try:
                limit = seconds(self.time)
            except ValueError as error:
                return [*found, str(error)]
            if limit is not None and limit <= self.signal_seconds:
                found.append(
                    f"got a time limit of {limit} s and signal_seconds {self.signal_seconds}: the job would be told to "
                    "stop before it starts. Raise --time, or lower --signal_seconds."
                )
        return found

    def _word_faults(self) -> list[str]:
        found = []
        asked = [name.strip() for name in self.stages.split(",")]
        if not all(name in STAGES for name in asked) or len(set(asked)) < len(asked):
            found.append(f"got stages {self.stages!r}, expected one or more of {', '.join(STAGES)}, by commas.")
        if self.signal not in SIGNALS:
            found.append(
                f"got signal {self.signal!r}, expected one of {', '.join(SIGNALS)}. TERM is what Slurm itself sends "
                "when it takes a job's nodes away."
            )
        if self.mem is not None and not _MEMORY.fullmatch(str(self.mem)):
            found.append(f"got mem {self.mem!r}, expected a number with K, M, G or T, e.g. 512G, or 0 for all.")
        odd = [name for name in self.env if not _NAME.fullmatch(name)]
        if odd:
            found.append(f"got env {odd}, expected names of environment variables, e.g. NCCL_SOCKET_IFNAME.")
        wrong = [job for job in self.after_list if not _AFTER.fullmatch(job)]
        if wrong:
            found.append(f"got after {wrong}, expected ids of jobs, as sbatch prints them.")
        if self.container_image and self.apptainer_image:
            found.append("got container_image and apptainer_image, expected one of them.")
        if self.container_mounts and not (self.container_image or self.apptainer_image):
            found.append("got container_mounts without an image; give --container_image or --apptainer_image.")
        return found

    def _raw_faults(self) -> list[str]:
        found = []
        for where, options in (
            ("slurm", self.slurm), ("encode.slurm", self.encode.slurm), ("export.slurm", self.export.slurm),
        ):  # fmt: skip
            for option in options:
                matched = _RAW.fullmatch(option)
                if matched is None:
                    found.append(f"got {where} {option!r}, expected --key=value or --key, as sbatch has them.")
                elif matched[1] in _TAKEN:
                    found.append(f"got {where} {option!r}; use {_TAKEN[matched[1]]}.")
        for where, options in (("encode.options", self.encode.options), ("export.options", self.export.options)):
            found += [
                f"got {where} {option!r}, expected --key=value."
                for option in options
                if not re.fullmatch(r"--[a-z][a-z0-9_]*=[^\x00-\x1f\x7f]*", option)
            ]
        return found

    def _control_faults(self) -> list[str]:
        """Faults of texts with line breaks, which would start a new command; only `setup` may have them."""
        words = {name: value for name, value in vars(self).items() if isinstance(value, str)}
        words |= {f"modules[{i}]": word for i, word in enumerate(self.modules)}
        words |= {f"env.{name}": str(value) for name, value in self.env.items()}
        words |= {"encode.shards": self.encode.shards or "", "export.out": self.export.out or ""}
        return control_faults(words)


def control_faults(texts: dict[str, str]) -> list[str]:
    """One line for each text with control characters."""
    return [
        f"got {name} {text!r}, expected text without line breaks and other control characters."
        for name, text in texts.items()
        if has_control(text)
    ]


def has_control(text: str) -> bool:
    """Whether the text has characters that cannot be part of a script's line."""
    return any(ord(c) < 32 or 127 <= ord(c) < 160 or c in "\u2028\u2029" or "\ud800" <= c <= "\udfff" for c in text)


def raw_options(options: Sequence[str]) -> dict[str, str | None]:
    """Parses `--key=value` and `--key` into {key: value or None}."""
    found = (_RAW.fullmatch(option) for option in options)
    return {m[1]: m[2] for m in found if m}


def seconds(limit: str) -> int | None:
    """Parses a time limit in Slurm's notation into seconds; None means no limit.

    Raises:
        ValueError: if the text is not a time limit.
    """
    if limit.upper() in ("UNLIMITED", "INFINITE", "0"):
        return None
    found = re.fullmatch(
        r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+))?(?::(?P<ds>\d+))?)|(?P<rest>\d+(?::\d+){0,2})", limit
    )
    if found is None:
        raise ValueError(f"got time {limit!r}, expected [D-]HH:MM:SS or minutes, as sbatch takes it.")
    if found["rest"] is None:
        days, hours, minutes, secs = (int(found[name] or 0) for name in ("d", "dh", "dm", "ds"))
        return ((days * 24 + hours) * 60 + minutes) * 60 + secs
    parts = [int(part) for part in found["rest"].split(":")]
    if len(parts) == 1:
        return parts[0] * 60
    return parts[0] * 60 + parts[1] if len(parts) == 2 else (parts[0] * 60 + parts[1]) * 60 + parts[2]
