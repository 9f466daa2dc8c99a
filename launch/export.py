"""`reblock export`: writes a complete diffusers pipeline folder from a run's graft and its base."""

import os
import shutil
from pathlib import Path
from typing import Literal

import torch

from data.base_folder import resolve_base
from data.files import write_json
from launch.run_folder import RunFolder
from trainer.graft import apply_graft, check_graft_base, load_graft
from trainer.models.load import load_transformer


def export(
    run: Path,
    out: Path,
    *,
    base: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
) -> None:
    """Writes a complete diffusers pipeline folder that the pipeline of the base's family loads.

    Args:
        run: run folder with a graft.safetensors, or the graft file itself.
        out: folder to write; it must not exist.
        base: base on which the graft was trained; by default the one that the graft names.
        weights: weights of the retrained blocks: averaged (`ema`) or last (`raw`).
        dtype: dtype of the written transformer; float32 keeps the retrained blocks exact.

    Raises:
        ValueError: if `out` exists, the graft is missing, or the graft was trained on another base.
    """
    if out.exists():
        raise ValueError(
            f"{out} exists; expected a new folder, since nothing is overwritten. Remove it or name another."
        )
    graft = RunFolder(run).read_graft() if run.is_dir() else load_graft(run)
    folder = resolve_base(base or graft.base)
    check_graft_base(graft, folder)
    model = load_transformer(str(folder), dtype=getattr(torch, dtype))
    apply_graft(model, graft.ema if weights == "ema" else graft.raw)

    beside = out.with_name(out.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    if (folder / "model_index.json").is_file():
        # All other parts of the pipeline are copies of the base's files.
        shutil.copytree(folder, beside, ignore=shutil.ignore_patterns("transformer", "planted.json"))
    model.save_pretrained(beside / "transformer", safe_serialization=True)
    write_json(
        beside / "reblock.json",
        {"blocks": list(graft.blocks), "base": graft.base, "weights": weights, "step": graft.step},
    )
    os.replace(beside, out)
    print(f"{out}: blocks {list(graft.blocks)} ({weights} weights, step {graft.step}) on {folder}")
