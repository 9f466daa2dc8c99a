"""Recipes of small models for plans, and the steps that plans are compared with."""

import json
from pathlib import Path
from typing import Any

import yaml

#: Wide enough that tensors, not bookkeeping, take the memory.
SMALL = {
    "_class_name": "MochiTransformer3DModel",
    "patch_size": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "num_layers": 4,
    "pooled_projection_dim": 64,
    "in_channels": 4,
    "qk_norm": "rms_norm",
    "text_embed_dim": 32,
    "time_embed_dim": 32,
    "activation_fn": "swiglu",
    "max_sequence_length": 32,
}

#: Frames, height and width of clips whose latents are (4, 3, 8, 12).
CLIP = ("--frames", "13", "--height", "64", "--width", "96")
LATENT = (4, 3, 8, 12)


def recipe(folder: Path, *, config: dict | None = None, model: dict | None = None, trainer: dict | None = None,
           data: dict | None = None) -> list[str]:  # fmt: skip
    """Options of a recipe that lies in `folder`, on a CPU with batches of two."""
    base = folder / "config.json"
    base.write_text(json.dumps(config or SMALL))
    content: dict[str, Any] = {
        "run": {"name": "planned", "root": str(folder / "runs"), "wandb": False},
        "trainer": {"accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": 1} | (trainer or {}),
        "model": {
            "class_path": "trainer.module.RetrainBlocks",
            "init_args": {"base": str(base), "surgery": {"last": 2, "init": "torch"}} | (model or {}),
        },
        "data": {
            "class_path": "data.modules.latents.LatentDataModule",
            "init_args": {"shards": "nowhere", "batch_size": 2, "val_batch_size": 1} | (data or {}),
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return ["--config", str(path)]
