"""The `run` part of a recipe: name and place of the run folder, checkpoints, logging, deadlines."""

from dataclasses import dataclass
from pathlib import Path

from launch.run_folder import RunFolder


@dataclass(kw_only=True)
class RunConfig:
    """The run folder and what is kept in it.

    Args:
        name: name of the run; its folder is ROOT/NAME.
        root: folder that holds the runs.
        resume: go on with a run of this name from its last checkpoint; without it, an existing name is refused.
        save_every: optimiser steps between two saves of `last.ckpt`.
        save_failures: writes of checkpoints that may fail in a row, on a full disk say; one more stops the run.
        keep_best: how many checkpoints of lowest validation loss are kept.
        wandb: also log to Weights & Biases (offline unless WANDB_MODE says otherwise).
        watchdog_s: seconds in which a rank must finish a step, a validation batch, a measured batch or a checkpoint
            (the first step may take four times as long); past it all ranks leave their stacks and end. 0 turns it off.
        collective_timeout_s: seconds that a rank waits for the others in a collective, through a broken network too;
            None leaves it to the strategy (30 minutes).
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
        """ROOT/NAME."""
        return RunFolder(Path(self.root) / self.name)


def refuse_taken(run: RunConfig) -> None:
    """Raises ValueError if the run's name is taken and `resume` is off."""
    folder = run.folder.path
    taken = folder.exists() and any(folder.iterdir())
    if taken and not run.resume:
        raise ValueError(
            f"run {run.name!r} exists in {folder}; expected a new name, since nothing is overwritten. "
            "Give --run.name another name, or go on with it: --run.resume true."
        )


def prepare_folder(run: RunConfig) -> None:
    """Makes the run folder, or finds the one to resume.

    Raises:
        ValueError: if the name is taken and `resume` is off, or the folder cannot be written.
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
