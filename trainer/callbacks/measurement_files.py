"""Output of a measurement: arrays (.npz) and figures (PNG) in the run folder, and scalars for the loggers."""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.files import write_bytes
from trainer.models.planted_record import read_planted
from trainer.run_files import FIGURES, MEASUREMENTS


def measurement_path(run: str | Path, kind: str, stage: str) -> Path:
    """Path of a measurement's arrays: RUN/measurements/KIND-STAGE.npz."""
    return Path(run) / MEASUREMENTS / f"{kind}-{stage}.npz"


def figure_path(run: str | Path, kind: str, stage: str) -> Path:
    """Path of a measurement's figure: RUN/figures/KIND-STAGE.png."""
    return Path(run) / FIGURES / f"{kind}-{stage}.png"


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of numbers, booleans and strings, compressed, atomically.

    Raises:
        ValueError: if an array holds Python objects, which only pickle could store.
    """
    odd = [name for name, value in arrays.items() if np.asarray(value).dtype.hasobject]
    if odd:
        raise ValueError(f"got object arrays {odd}, expected numbers, booleans or strings: convert them first.")
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]  # numpy reads them as its own flags
    write_bytes(path, buffer.getvalue())


#: What numpy and zipfile raise for damaged files.
_DAMAGE = (
    OSError, EOFError, ValueError, TypeError, RuntimeError, NotImplementedError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads a file that `save_arrays` wrote, without pickle, so no code in the file is executed.

    Raises:
        ValueError: if the file is damaged or truncated.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (FileNotFoundError, PermissionError):
        raise
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is damaged or truncated ({error}), expected the arrays of a measurement. Copy it again, or remove "
            "it: the measurement then counts as not made."
        ) from error


def save_figure(path: Path, figure: Figure) -> None:
    """Writes a figure as PNG, atomically."""
    figure.set(dpi=130, facecolor="white")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)  # `savefig` writes the same bytes, but draws twice
    write_bytes(path, buffer.getvalue())


def log_figure(trainer: Trainer, name: str, path: Path) -> None:
    """Logs a saved figure with the loggers that accept images (Weights & Biases)."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(f"figures/{name}", [str(path)], step=trainer.global_step)


def log_scalars(trainer: Trainer, scalars: Mapping[str, float]) -> None:
    """Logs scalars with every logger at the current step; only the loggers of rank zero write."""
    values = {name: float(value) for name, value in scalars.items()} | {"epoch": trainer.current_epoch}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)


def planted_heads(base: str) -> set[tuple[int, int]]:
    """(layer, head) of the sinks that `reblock plant` put into a base; empty for other bases."""
    return {(head["layer"], head["head"]) for head in (read_planted(base) or {"heads": []})["heads"]}
