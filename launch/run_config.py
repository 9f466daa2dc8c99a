"""The `run` part of a recipe: name and location of the run folder, checkpoints, logging, deadlines."""

from dataclasses import dataclass
from pathlib import Path

from launch.run_folder import RunFolder


@dataclass(kw_only=True)
class RunConfig:
    """The run folder, and settings for checkpoints, logging and deadlines.

    Args:
        name: name of the run; its folder is ROOT/NAME.
        root: folder that contains the runs.
        resume: whether to resume an existing run of this name from its last checkpoint; otherwise it is refused.
        save_every: number of optimiser steps between two saves of `last.ckpt`.
        save_failures: number of consecutive failed writes of checkpoints, e.g. on a full disk, before one more stops
            the run.
        keep_best: number of checkpoints with the lowest validation loss to keep; -1 keeps all.
        wandb: whether to log to Weights & Biases too, offline unless WANDB_MODE says otherwise.
        watchdog_s: deadline in seconds for each step, validation batch, measured batch and checkpoint, and four times
            that for the first step. A rank that exceeds it writes its stacks and exits. 0 turns the watchdog off.
        collective_timeout_s: seconds that a rank waits for the others in a collective, also if the network is down;
            None takes the strategy's default (30 minutes).
    """

    name: str
    root: str = "runs"
    resume: bool = False
    save_every: int = 200
    save_failures: int = 5
    keep_best: int = 2
    wandb: bool = True
    watchdog_s: float = 1800.0
    collective_timeout_s: float | None = None

    def __post_init__(self) -> None:
        faults = []
        if not self.name or self.name in (".", "..") or "/" in self.name:
            faults.append(f"run.name {self.name!r}, expected the name of a folder inside run.root")
        if self.save_every < 1:
            faults.append(f"run.save_every {self.save_every}, expected at least 1 step")
        if self.save_failures < 0:
            faults.append(f"run.save_failures {self.save_failures}, expected a count")
        if self.keep_best < -1:
            faults.append(f"run.keep_best {self.keep_best}, expected a count, or -1 for every checkpoint")
        if self.watchdog_s < 0 or (self.collective_timeout_s or 1) <= 0:
            faults.append(
                f"run.watchdog_s {self.watchdog_s}, run.collective_timeout_s {self.collective_timeout_s}, expected "
                "seconds, 0 for no watchdog, null for the strategy's own timeout"
            )
        if faults:
            raise ValueError(f"got {'; '.join(faults)}. Mend it in the recipe or on the command line.")

    @property
    def folder(self) -> RunFolder:
        """The run folder, ROOT/NAME."""
        return RunFolder(Path(self.root) / self.name)


def refuse_taken(run: RunConfig) -> None:
    """Raises ValueError if the run exists and `resume` is off."""
    folder = run.folder.path
    taken = folder.exists() and any(folder.iterdir())
    if taken and not run.resume:
        raise ValueError(
            f"run {run.name!r} exists in {folder}; expected a new name, since nothing is overwritten. "
            "Give --run.name another name, or go on with it: --run.resume true."
        )


def prepare_folder(run: RunConfig) -> None:
    """Creates the run folder unless a run is resumed, and checks that it is writable.

    Raises:
        ValueError: if the run exists and `resume` is off, or the folder is not writable.
    """
    refuse_taken(run)
    folder = run.folder.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"cannot write the run folder {folder} ({error.strerror}); expected a writable place. Set --run.root."
        ) from error
