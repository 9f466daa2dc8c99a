"""Checkpoint files that are complete or absent, hold no code, and are read without running any."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO


class CheckpointFiles(TorchCheckpointIO):
    """Writes a checkpoint beside its place, forces it to the disk and renames it; reads it with `weights_only`.

    Lightning's own writer renames too, but does not wait for the disk: after a power cut the new name may hold nothing.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """The checkpoint's content.

        Raises:
            ValueError: if the file is missing, damaged, or holds anything but tensors and plain values.
        """
        if not Path(path).is_file():
            raise ValueError(f"{path} does not exist; expected a checkpoint. Start the run without run.resume.")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({type(error).__name__}: {str(error).splitlines()[0]}); expected a checkpoint "
                "that Reblock wrote. Resume from another one in the same folder by copying it to last.ckpt."
            ) from error


def random_states() -> dict[str, Any]:
    """The states of every random generator of this process, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    # legacy=False gives a dict with the key array apart, which can be held as a list
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]  # noqa: NPY002 -- the global generator itself is saved
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            str(numpy_state["bit_generator"]),
            numpy_state["state"]["key"].tolist(),
            int(numpy_state["state"]["pos"]),
            int(numpy_state["has_gauss"]),
            float(numpy_state["gauss"]),
        ],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Sets what `random_states` gave; device generators only where as many devices are there."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states["cuda"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    state = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.set_state(state)  # noqa: NPY002 -- the global generator itself is restored
