"""What each rank did in each step, written down as it goes: for comparing a disturbed run with an undisturbed one."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from data.batch import Batch

#: Moments of a fit, as far as `Trace` tells them apart.
START, FORWARD, BACKWARD, UPDATE, BETWEEN, VALIDATION, MEASURING = (
    "start-up", "forward pass", "backward pass", "update", "between steps", "validation", "measuring",
)  # fmt: skip


class Trace(Callback):
    """Leaves `trace/rankN.jsonl` in the run folder, a line per step, and `trace/rankN.now`, the moment it is in.

    A line: {"step", "epoch", "batch", "uids", "sigma", "noise", "losses", "time"}; uids, sigma, noise and losses of
    each sample; floats are hexadecimal, the noise is a SHA-256. Put it first in the recipe: it marks where other
    callbacks measure.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir) / "trace"
        folder.mkdir(parents=True, exist_ok=True)
        rank = trainer.global_rank
        flags = os.O_WRONLY | os.O_CREAT
        self._lines = os.open(folder / f"rank{rank}.jsonl", flags | os.O_APPEND)
        self._now = os.open(folder / f"rank{rank}.now", flags)
        self._mark(START)

    def _mark(self, moment: str) -> None:
        os.pwrite(self._now, f"{moment:<16}".encode(), 0)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        losses = pl_module.losses

        def noted(batch: Batch, noise: Tensor, sigma: Tensor) -> Tensor:
            found = losses(batch, noise, sigma)
            if trainer.training:
                self._seen = (batch.uids, sigma, noise, found.detach())
            return found

        pl_module.losses = noted
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
        os.write(self._lines, (json.dumps(line) + "\n").encode())  # one call: a line is there or not
        self._mark(BETWEEN)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(VALIDATION)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(BETWEEN)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(MEASURING)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._mark(BETWEEN)


def moment(run: Path, rank: int) -> str:
    """The moment that a rank was in last."""
    path = run / "trace" / f"rank{rank}.now"
    return path.read_text().strip() if path.is_file() else START


def read_trace(run: Path, ranks: int) -> list[list[dict[str, Any]]]:
    """The lines of each rank, without their times."""
    found = []
    for rank in range(ranks):
        path = run / "trace" / f"rank{rank}.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        found.append([{key: value for key, value in line.items() if key != "time"} for line in lines])
    return found


def count_steps(run: Path, rank: int = 0) -> int:
    """Steps that a rank has written down, those taken twice counted twice."""
    path = run / "trace" / f"rank{rank}.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0
