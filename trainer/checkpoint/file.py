"""One checkpoint file: complete or absent, read without running any code, and known when it is damaged."""

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from trainer.run_files import LAST, PREVIOUS

#: What a run cannot be resumed without.
_KEYS = ("global_step", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a file that is complete or absent; what `last.ckpt` replaces becomes `previous.ckpt`.

    Raises:
        OSError: if it cannot be written; nothing is left of it then.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if path.name == LAST:
            _replace_last(beside, path)
        else:
            os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer puts an error of its own on top of the file's
        raise


def _replace_last(beside: Path, last: Path) -> None:
    """Puts a complete file in `last`'s place and keeps what was there: both names lead to whole files all along."""
    previous = last.with_name(PREVIOUS)
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(last, link)
    except FileNotFoundError:
        os.replace(beside, last)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A file system without hard links: for a moment, only `previous` is there.
        os.replace(last, previous)
        os.replace(beside, last)
    else:
        os.replace(beside, last)
        os.replace(link, previous)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if it is whole.

    Reads the file once and compares the checksum (CRC-32) of every part, which `torch.load` does not do; about half a
    second a GB, and what the disk takes.

    Raises:
        PermissionError: if it may not be read, which says nothing about what is in it.
    """
    try:
        with zipfile.ZipFile(path) as parts:
            broken = parts.testzip()
        if broken is not None:
            return f"{broken} is not what was written (CRC-32)"
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        missing = [key for key in _KEYS if key not in found]
    except PermissionError:
        raise
    except Exception as error:
        return in_short(error)
    return f"it lacks {', '.join(missing)}" if missing else None


def in_short(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
