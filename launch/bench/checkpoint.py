"""`reblock bench checkpoint`: how long a checkpoint delays training, written in the background or in the foreground.

A real fit is divided into intervals of steps. They start with no save, a background save or a foreground save, in
turn, so that a busy machine slows all alike. The delay is measured in two ways: the time of the save itself, in which
no step can run, and the extra time of the whole interval over one without a save. The latter includes the slowdown of
later steps by the writing thread.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, IterableDataset

from data.batch import Batch
from launch.bench.result import BenchResult, choose_device
from launch.bench.step import CAPTIONS, CONFIG, RETRAINED, config_file, make_batch
from trainer.callbacks.random_state import RandomStateCheckpoint
from trainer.checkpoint.io import BackgroundCheckpointIO
from trainer.module import RetrainBlocks, SurgeryConfig
from trainer.run_files import LAST

NONE, BACKGROUND, FOREGROUND = "no checkpoint", "written in the background", "written in the foreground"
MODES = (NONE, BACKGROUND, FOREGROUND)
#: Number of steps in an interval; a write may take most of an interval.
INTERVAL = 12
#: (C, F, H, W) with 64 vision tokens, so that a step is short relative to its checkpoint.
LATENT = (12, 4, 8, 8)


class _RepeatedBatch(IterableDataset):
    """Repeats one batch endlessly."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self._batch


@dataclass
class SaveTimes:
    """Times of a mode, with one value per interval.

    Args:
        save: seconds of the save.
        whole: seconds of the whole interval.
        written: seconds until the file was on disk.
    """

    save: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    written: list[float] = field(default_factory=list)


class _TimedSaves(Callback):
    """Saves at the start of each interval according to its mode, and records the times."""

    def __init__(self, files: BackgroundCheckpointIO, path: Path, rounds: int) -> None:
        self.files, self.path = files, path
        # The first round does not count, since it allocates the optimiser's state and the snapshot's memory.
        self.modes = list(MODES) * (rounds + 1)
        self.times = {mode: SaveTimes() for mode in MODES}
        self._left = 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._left -= 1
        if self._left:
            return
        _synchronize(trainer.strategy.root_device)
        if batch_idx:
            self._finish()
        if not self.modes:
            trainer.should_stop = True
            return
        self._mode, self._left = self.modes.pop(0), INTERVAL
        self._begun = time.perf_counter()
        if self._mode != NONE:
            self.files.background = self._mode == BACKGROUND
            trainer.save_checkpoint(self.path)
        self._saved = time.perf_counter() - self._begun

    def _finish(self) -> None:
        whole = time.perf_counter() - self._begun
        self.files.wait()
        times = self.times[self._mode]
        times.save.append(self._saved)
        times.whole.append(whole)
        # An upper bound, since the write may have ended before the wait started.
        times.written.append(time.perf_counter() - self._begun)


def measure(config: dict, latent: tuple, captions: tuple, *, last: int, device: str, rounds: int) -> dict[str, Any]:
    """Measures `rounds` intervals of each mode; returns `SaveTimes` by mode, and the file's size under "bytes"."""
    torch.manual_seed(0)
    with config_file(config) as base, tempfile.TemporaryDirectory(prefix="reblock-bench-") as folder:
        files, path = BackgroundCheckpointIO(), Path(folder) / "checkpoints" / LAST
        saves = _TimedSaves(files, path, rounds)
        module = RetrainBlocks(base=base, surgery=SurgeryConfig(last=last))
        trainer = Trainer(
            accelerator="gpu" if device.startswith("cuda") else device, devices=1, precision="32-true", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, plugins=[files],
            callbacks=[RandomStateCheckpoint(), saves], default_root_dir=folder, max_epochs=1, num_sanity_val_steps=0,
            limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, DataLoader(_RepeatedBatch(make_batch(config, latent, captions)), batch_size=None))
        found: dict[str, Any] = {
            mode: SaveTimes(times.save[1:], times.whole[1:], times.written[1:]) for mode, times in saves.times.items()
        }
        return found | {"bytes": path.stat().st_size}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(*, device: str = "auto", repeats: int = 7) -> BenchResult:
    """Measures by how many steps a checkpoint delays training, written in the background and in the foreground.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        repeats: number of interleaved intervals of each mode.
    """
    device = choose_device(device)
    found = measure(CONFIG, LATENT, CAPTIONS, last=RETRAINED, device=device, rounds=repeats)
    step = statistics.median(found[NONE].whole) / INTERVAL
    rows = []
    for mode in (BACKGROUND, FOREGROUND):
        times = found[mode]
        # Compares each interval with the interval without a save of the same round.
        longer = [
            (with_save - without) / step for with_save, without in zip(times.whole, found[NONE].whole, strict=True)
        ]
        rows.append([mode, _spread([s * 1000 for s in times.save], 0), _spread([s / step for s in times.save], 2),
                     _spread(longer, 2)])  # fmt: skip
    return BenchResult(
        title=f"A checkpoint of {found['bytes'] / 2**20:.0f} MiB, a step of {step * 1000:.0f} ms",
        columns=(
            "",
            "save, ms: median (least .. most)",
            "save, steps",
            f"{INTERVAL} steps with it are longer by, steps",
        ),
        rows=rows,
        notes=(
            f"{repeats} intervals of {INTERVAL} steps of each kind, in turn; last {RETRAINED} of "
            f"{CONFIG['num_layers']} blocks retrained, float32: weights, average, two moments.",
        ),
        device=device,
    )


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} .. {max(values):.{digits}f})"
