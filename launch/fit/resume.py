"""How a run is resumed: from an undamaged checkpoint, the same one on every rank, without files left half written."""

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

#: Seconds for which a rank waits to see what rank zero sees; NFS keeps what it knows of a folder for up to 60.
_LAG_S = 120.0


def find_checkpoint(run: RunFolder) -> Path | None:
    """The checkpoint that a run goes on from: the last one, or the one before it where the last is damaged or missing.

    Says which, where it is not the last. None if there is no checkpoint at all.

    Raises:
        ValueError: if there are checkpoints, and all are damaged.
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
    """Renames a damaged last checkpoint, which the next save would otherwise keep as the one before it."""
    if last.is_file():
        damaged = last.with_name(last.name + ".damaged")
        os.replace(last, damaged)
        print(f"the damaged {last} is now {damaged.name}")


def clear_leftovers(run: RunFolder) -> None:
    """Removes the files that a killed process was writing; none of them has its final name."""
    for folder in (run.path, run.checkpoints, run.measurements, run.figures):
        for path in (*temporaries(folder), *folder.glob("*.tmp")):  # *.tmp: of earlier versions
            if path.is_file():
                path.unlink(missing_ok=True)


class SharedCheckpoint(ChosenCheckpoint):
    """Every rank restores the file that rank zero has chosen, whatever its own view of a shared folder shows yet.

    Before Lightning calls this, ranks cannot speak to each other, and may not even all exist.
    """

    def choose(self, path: str | None) -> str | None:
        return path_of_rank_zero(self.trainer, path)


def path_of_rank_zero(trainer: Trainer, path: str | Path | None) -> str | None:
    """Rank zero's path, on every rank, once the file is seen there as rank zero sees it.

    Args:
        trainer: whose ranks can speak to each other.
        path: of rank zero; what other ranks give does not count.

    Raises:
        ValueError: on every rank, if one does not see the file in time.
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
    """Bytes, and second of the last change; None if the file is not there."""
    try:
        found = file.stat() if file else None
    except FileNotFoundError:
        found = None
    return (found.st_size, int(found.st_mtime)) if found else None
