"""The environment of a process: versions of Python and packages, git commit, hardware."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from trainer.versions import package_versions

#: Packages that a run's results depend on.
PACKAGES = (
    "torch", "lightning", "diffusers", "transformers", "webdataset", "decord2", "safetensors", "torchmetrics", "av",
    "jsonargparse", "numpy", "wandb",
)  # fmt: skip

#: Folder of our packages: the root of a checkout, or site-packages.
_ROOT = Path(__file__).resolve().parents[1]


def git_output(*command: str) -> str:
    """Output of `git COMMAND` in the checkout of the code; empty outside a checkout or without git."""
    try:
        done = subprocess.run(["git", "-C", str(_ROOT), *command], capture_output=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode(errors="replace")


def git_commit() -> str | None:
    """Commit of the code, with `+changes` if the working tree differs from it; None outside a checkout."""
    return git_output("describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*").strip() or None


def cpu_model() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> dict[str, Any]:
    """Content of versions.json: Python, packages, git commit, hardware and command of this process."""
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "git": git_commit(),
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count(), "accelerators": devices},
        "command": shlex.join(sys.argv),
    }
