"""Records what each rank does in each step, so that a disturbed run can be compared with an undisturbed one."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.batch import Batch
from trainer.distillation import ObjectivePhase

#: Phases of a fit that `StepRecorder` tells apart.
START, FORWARD, BACKWARD, UPDATE, BETWEEN, VALIDATION, MEASURING = (
    "start-up", "forward pass", "backward pass", "update", "between steps", "validation", "measuring",
)  # fmt: skip


class StepRecorder(Callback):
    """Writes `trace/rankN.jsonl` in the run folder, one line a step, and `trace/rankN.now`, the current phase.

    A line is {"step", "epoch", "batch", "uids", "sigma", "noise", "losses", "time"}. It has the uid, sigma, noise and
    loss of each sample, floats in hexadecimal and the noise as a SHA-256. The callback comes first in the recipe, so
    that it also marks when other callbacks measure.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir) / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        rank = trainer.global_rank
        flags = os.O_WRONLY | os.O_CREAT
        self._lines = os.open(folder / f"rank{rank}.jsonl", flags | os.O_APPEND)
        self._now = os.open(folder / f"rank{rank}.now", flags)
        self._mark(START)

    def _mark(self, phase: str) -> None:
        os.pwrite(self._now, f"{phase:<16}".encode(), 0)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        losses = pl_module.objective_losses

        def recorded(batch: Batch, noise: Tensor, sigma: Tensor, phase: ObjectivePhase) -> Tensor:
            found = losses(batch, noise, sigma, phase)
            self._seen = (batch.uids, sigma, noise, found.detach())
            return found

        pl_module.objective_losses = recorded
        self._mark(MEASURING)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._mark(FORWARD)
        self._step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._mark(BACKWARD)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._mark(UPDATE)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        uids, sigma, noise, losses = self._seen
        line = {
            "step": self._step, "epoch": trainer.current_epoch, "batch": batch_idx, "uids": list(uids),
            "sigma": [value.hex() for value in sigma.tolist()],
            "noise": [hashlib.sha256(one.tobytes()).hexdigest() for one in noise.cpu().numpy()],
            "losses": [value.hex() for value in losses.tolist()], "time": time.monotonic(),
        }  # fmt: skip
        os.write(self._lines, (json.dumps(line) + "\n").encode())  # one call: a killed rank leaves no half line
        self._mark(BETWEEN)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(BETWEEN)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(MEASURING)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(BETWEEN)


def last_phase(run: Path, rank: int) -> str:
    """The phase in which a rank was last."""
    path = run / "trace" / f"rank{rank}.now"
    return path.read_text().strip() if path.is_file() else START


def read_trace(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """The lines of a rank; of one that still runs, without a line whose end is not there yet."""
    path = run / "trace" / f"rank{rank}.jsonl"
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def read_traces(run: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """The lines of each rank, without their times."""
    return [
        [{key: value for key, value in line.items() if key != "time"} for line in read_trace(run, rank)]
        for rank in range(ranks)
    ]


def count_steps(run: Path, rank: int = 0) -> int:
    """Steps that a rank has recorded; a repeated step counts each time."""
    path = run / "trace" / f"rank{rank}.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
