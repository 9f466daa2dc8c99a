"""One checkpoint file: written atomically, read without running code from it, checked for damage."""

import errno
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from data.files import sync, sync_names, temporary_path
from trainer.run_files import LAST, PREVIOUS

#: Without these entries a run cannot be resumed.
_KEYS = ("global_step", "state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers")


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes a checkpoint atomically; the file that a new `last.ckpt` replaces becomes `previous.ckpt`.

    Raises:
        OSError: if it cannot be written; nothing is left of it then.
    """
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
        sync(temporary)
        if path.name == LAST:
            _replace_last(temporary, path)
        else:
            os.replace(temporary, path)
        sync_names(path.parent)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None  # torch's writer raises an error of its own on top of the file's
        raise
    finally:
        temporary.unlink(missing_ok=True)


def _replace_last(temporary: Path, last: Path) -> None:
    """Renames a complete file to `last`, and what was there to `previous.ckpt`; one of the two is always there."""
    previous = last.with_name(PREVIOUS)
    link = temporary_path(previous)
    try:
        os.link(last, link)
    except FileNotFoundError:
        os.replace(temporary, last)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        # A file system without hard links: for a moment, only `previous.ckpt` is there.
        os.replace(last, previous)
        os.replace(temporary, last)
    else:
        try:
            os.replace(temporary, last)
            os.replace(link, previous)
        finally:
            link.unlink(missing_ok=True)


def checkpoint_fault(path: Path) -> str | None:
    """What is wrong with a checkpoint file, or None if it is complete and undamaged.

    Reads the file once and compares the checksum (CRC-32) of every part, which `torch.load` does not do: about half a
    second per GB on top of the time of reading.

    Raises:
        PermissionError: if the file may not be read: that says nothing about its content.
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
        return summarise(error)
    return f"it lacks {', '.join(missing)}" if missing else None


def summarise(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
