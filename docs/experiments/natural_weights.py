"""Averaged weights of a run in bfloat16, out of its last checkpoint, and a run folder made of them.

    python docs/experiments/natural_weights.py RUN FILE.safetensors
    python docs/experiments/natural_weights.py FILE.safetensors RUN

A fit that SIGTERM stopped has no graft yet. The folder made has only one, which `reblock pipeline --run` reads.
"""

import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from launch.run_folder import RunFolder
from trainer.graft import Graft, save_graft


def store(run: Path, out: Path) -> None:
    """Writes the averaged weights of the run's last checkpoint, in bfloat16."""
    checkpoint = torch.load(RunFolder(run).last_checkpoint, map_location="cpu", weights_only=False)
    average = checkpoint["reblock"]["ema"]["average"]
    narrow = {name: value.to(torch.bfloat16).contiguous() for name, value in average.items()}
    save_file(narrow, out, {"step": str(checkpoint["global_step"])})


def restore(file: Path, run: Path) -> None:
    """Writes a graft of all blocks; it names no base, since it is applied to random weights."""
    with safe_open(file, framework="pt") as opened:
        step = int((opened.metadata() or {}).get("step", 0))
    weights = {name: value.float() for name, value in load_file(file).items()}
    blocks = sorted({int(name.split(".")[1]) for name in weights if name.startswith("transformer_blocks.")})
    run.mkdir(parents=True, exist_ok=True)
    save_graft(
        run / "graft.safetensors",
        Graft(raw={}, ema=weights, blocks=tuple(blocks), base="", base_fingerprint="", step=step),
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"error: got {sys.argv[1:]}, expected: RUN FILE.safetensors, or FILE.safetensors RUN")
    source, target = map(Path, sys.argv[1:])
    (store if source.is_dir() else restore)(source, target)
