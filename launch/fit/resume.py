"""Resumes a run: finds an undamaged checkpoint, shares the choice with all ranks, and removes incomplete files."""

import logging
import os
import time
from pathlib import Path

from lightning.pytorch import Trainer

from data.files import temporaries
from launch.fit.lightning_private import ChosenCheckpoint
from launch.run_folder import RunFolder
from trainer.callbacks.rank_errors import raise_on_all_ranks
from trainer.checkpoint.file import checkpoint_fault

log = logging.getLogger(__name__)

#: Seconds that a rank waits until it sees rank zero's file; NFS caches the attributes of a folder for up to 60 s.
_LAG_S = 120.0


def find_checkpoint(run: RunFolder) -> Path | None:
    """The checkpoint to resume from: the last one, or the previous one if the last is damaged or missing.

    Prints a line if it is the previous one. Returns None if there is no checkpoint.

    Raises:
        ValueError: if all existing checkpoints are damaged.
    """
    last, faults = run.last_checkpoint, list[str]()
    for path in (last, run.previous_checkpoint):
        if not path.is_file():
            continue
        fault = checkpoint_fault(path)
        if fault is None:
            if path != last:
                print(f"{faults[0] if faults else f'{last} is missing'}; going on from the one before it, {path}")
            return path
        faults.append(f"{path} cannot be read ({fault})")
    if faults:
        raise ValueError(
            f"{' and '.join(faults)}; expected a checkpoint that Reblock wrote. Resume from another one in the same "
            "folder by copying it to last.ckpt."
        )
    return None


def rename_damaged(last: Path) -> None:
    """Renames a damaged last checkpoint; otherwise the next save would keep it as the previous checkpoint."""
    if last.is_file():
        damaged = last.with_name(last.name + ".damaged")
        os.replace(last, damaged)
        print(f"the damaged {last} is now {damaged.name}")


def clear_leftovers(run: RunFolder) -> None:
    """Removes temporary files that a killed process has left."""
    for folder in (run.path, run.checkpoints, run.measurements, run.figures):
        for path in (*temporaries(folder), *folder.glob("*.tmp")):  # *.tmp: earlier versions wrote these
            if path.is_file():
                path.unlink(missing_ok=True)


class SharedCheckpoint(ChosenCheckpoint):
    """Restores the file that rank zero has chosen on every rank, since other ranks may see an outdated shared folder.

    Ranks can communicate only from the point at which Lightning calls this.
    """

    def choose(self, path: str | None) -> str | None:
        return path_of_rank_zero(self.trainer, path)


def path_of_rank_zero(trainer: Trainer, path: str | Path | None) -> str | None:
    """Returns rank zero's path on every rank, after each rank sees the file with the same size and time.

    Args:
        trainer: Trainer with a running process group.
        path: path on rank zero; ignored on other ranks.

    Raises:
        ValueError: if a rank does not see the file in time; all ranks raise.
    """
    with raise_on_all_ranks(trainer):
        file = Path(path) if path and trainer.is_global_zero else None
        chosen, expected = trainer.strategy.broadcast((str(file) if file else None, _size_and_time(file)))
        deadline, warned = time.monotonic() + _LAG_S, False
        while (found := _size_and_time(Path(chosen) if chosen else None)) != expected:
            if not warned:
                log.warning("%s is not here yet as rank zero sees it: waits up to %.0f s", chosen, _LAG_S)
                warned = True
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank {trainer.global_rank} finds {found} (bytes, modified) at {chosen}, rank zero {expected}; "
                    "expected the same file. Put run.root where every node sees it."
                )
            time.sleep(1.0)
    return chosen


def _size_and_time(file: Path | None) -> tuple[int, int] | None:
    """Size in bytes and modification time in whole seconds; None if the file does not exist."""
    try:
        found = file.stat() if file else None
    except FileNotFoundError:
        found = None
    return (found.st_size, int(found.st_mtime)) if found else None
