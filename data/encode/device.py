"""Where the encoders run, and how many processes decode beside them."""

import os
import re

import torch


def choose_device(device: str) -> str:
    """Resolves `auto` to cuda or cpu, and `cuda` to the device of this task among those of its node.

    Raises:
        ValueError: for another name, or a device that does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    named = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if named is None:
        raise ValueError(f"got device {device!r}, expected cpu, cuda, cuda:N (N a number) or auto.")
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"got device {device!r}, but torch finds no CUDA device; use cpu, or auto.")
    if named[1]:
        if int(named[1]) >= torch.cuda.device_count():
            raise ValueError(
                f"got device {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices, from 0 on."
            )
        return device
    local = next((os.environ[n] for n in ("LOCAL_RANK", "SLURM_LOCALID") if os.environ.get(n, "").isdigit()), "0")
    # A task that sees only its own device has device 0, whatever its rank.
    return f"cuda:{int(local) % torch.cuda.device_count()}"


def default_processes(device: str) -> int:
    """All cores but one beside an accelerator; a quarter of them on a CPU, where the models need the cores too."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // 4 if device == "cpu" else cores - 1)
