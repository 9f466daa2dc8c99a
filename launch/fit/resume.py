"""Where a run goes on: the checkpoint that is whole, the same one on every rank, with no half file left beside it."""

import logging
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector

from data.files import temporaries
from launch.run_folder import RunFolder
from trainer.callbacks.rank_errors import raise_on_all_ranks
from trainer.checkpoint.file import checkpoint_fault

log = logging.getLogger(__name__)

#: Seconds for which a rank waits to see what rank zero sees; NFS keeps what it knows of a folder for up to 60.
_LAG = 120.0


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


def set_aside(last: Path) -> None:
    """Renames a damaged last checkpoint, which the next save would otherwise keep as the one before it."""
    if last.is_file():
        damaged = last.with_name(last.name + ".damaged")
        os.replace(last, damaged)
        print(f"the damaged {last} is now {damaged.name}")


def clear_leftovers(run: RunFolder) -> None:
    """Removes the incomplete files of a process that was killed while it wrote them; none has its final name."""
    for folder in (run.path, run.checkpoints, run.measurements, run.figures):
        for path in (*temporaries(folder), *folder.glob("*.tmp")):  # *.tmp: of earlier versions
            path.unlink(missing_ok=True)


class SharedCheckpoint(_CheckpointConnector):
    """Every rank restores the file that rank zero has chosen, whatever its own view of a shared folder shows yet.

    Before Lightning calls this, ranks cannot speak to each other, and may not even all exist.
    """

    def resume_start(self, checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
        super().resume_start(shared(self.trainer, checkpoint_path), weights_only=weights_only)


def shared(trainer: Trainer, path: str | Path | None) -> str | None:
    """Rank zero's path, on every rank, once the file is seen there as rank zero sees it.

    Args:
        trainer: whose ranks can speak to each other.
        path: of rank zero; what other ranks give does not count.

    Raises:
        ValueError: on every rank, if one does not see the file in time.
    """
    with raise_on_all_ranks(trainer):
        file = Path(path) if path and trainer.is_global_zero else None
        chosen, expected = trainer.strategy.broadcast((str(file) if file else None, _seen(file)))
        deadline, told = time.monotonic() + _LAG, False
        while (found := _seen(Path(chosen) if chosen else None)) != expected:
            if not told:
                log.warning("%s is not here yet as rank zero sees it: waits up to %.0f s", chosen, _LAG)
                told = True
            if time.monotonic() > deadline:
                raise ValueError(
                    f"rank {trainer.global_rank} finds {found} (bytes, modified) at {chosen}, rank zero {expected}; "
                    "expected the same file. Put run.root where every node sees it."
                )
            time.sleep(1.0)
    return chosen


def _seen(file: Path | None) -> tuple[int, int] | None:
    try:
        found = file.stat() if file else None
    except FileNotFoundError:
        found = None
    return (found.st_size, int(found.st_mtime)) if found else None
