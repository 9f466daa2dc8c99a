"""What a run writes down of itself, for the person who finds its folder later."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from data.files import write_json
from launch.run_folder import RunFolder
from trainer.versions import package_versions

PACKAGES = (
    "torch", "lightning", "diffusers", "transformers", "webdataset", "decord2", "safetensors", "torchmetrics", "av",
    "jsonargparse", "numpy", "wandb",
)  # fmt: skip


def _git() -> str | None:
    """Commit of the code, with `+changes` if the tree differs; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, Any]:
    """Python, packages, git commit, hardware and command of this process."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "git": _git(),
        "hardware": {"cpu": _cpu(), "cores": os.cpu_count(), "accelerators": devices},
        "command": shlex.join(sys.argv),
    }


class VersionsFile(Callback):
    """Writes `versions.json` into the run folder when a fit starts."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            write_json(RunFolder(Path(trainer.default_root_dir)).versions, versions())


class EpochLines(Callback):
    """One printed line per epoch: what stays readable in a job's log, where a progress bar does not."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        values = {k: float(v) for k, v in trainer.callback_metrics.items()}
        shown = [f"{key} {values[key]:.4f}" for key in ("train/loss", "val/loss") if key in values]
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}  step {trainer.global_step}  {'  '.join(shown)}")
