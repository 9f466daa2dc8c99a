"""The small fit that is killed: its shards, its recipe and its command line."""

import json
from pathlib import Path

import yaml

from data.bucket import Bucket
from launch.bench.stream import CHANNELS, write_shards

#: 72 samples, 8 of them held out, 4 in a step.
SAMPLES, HELD_OUT, BATCH, STEPS = 72, 8, 4, 16
#: Wide enough for a checkpoint that takes as long to write as a step.
TRANSFORMER = {
    "_class_name": "MochiTransformer3DModel", "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 32,
    "patch_size": 2, "pooled_projection_dim": 8, "in_channels": CHANNELS, "qk_norm": "rms_norm", "text_embed_dim": 16,
    "time_embed_dim": 16, "activation_fn": "swiglu", "max_sequence_length": 16,
}  # fmt: skip


def write_recipe(folder: Path, *, epochs: int, ranks: int) -> Path:
    """Writes `recipe.yaml`, and the shards and base that it names, into `folder`.

    The fit has two phases of the objective, a rate that decays, validation, a measurement, loader processes and
    checkpoints, and takes `STEPS` steps an epoch.
    """
    write_shards(folder / "latents", SAMPLES, Bucket(7, 32, 32), 18, None)
    (folder / "config.json").write_text(json.dumps(TRANSFORMER))
    measurement = {"prompts": 2, "sigmas": [0.5], "base_stage": False}
    recipe = {
        "run": {"name": "undisturbed", "root": str(folder / "runs"), "save_every": 3, "wandb": False},
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "devices": ranks, "strategy": "ddp" if ranks > 1 else "auto",
            "precision": "32-true", "max_epochs": epochs, "enable_model_summary": False,
            "callbacks": [
                {"class_path": "tests.kills.step_trace.StepRecorder"},
                {"class_path": "trainer.callbacks.sinks.SinkFrequency", "init_args": measurement},
            ],
        },
        "model": {
            "class_path": "trainer.module.RetrainBlocks",
            "init_args": {
                "base": str(folder / "config.json"), "surgery": {"last": 2}, "ema_decay": 0.9, "caption_dropout": 0.3,
                "optim": {"lr": 0.003, "warmup_steps": 5, "decay_steps": 9},
                "objective": [{"steps": 13, "blocks": 1.0}, {"flow": 1.0, "velocity": 0.5}],
            },
        },
        "data": {
            "class_path": "data.modules.latents.LatentDataModule",
            "init_args": {
                "shards": str(folder / "latents"), "val_samples": HELD_OUT, "global_batch_size": BATCH,
                "num_workers": 1,
            },
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def fit_arguments(recipe: Path, name: str) -> list[str]:
    """Arguments of `reblock` that start or resume the run `name`."""
    return ["fit", "--config", str(recipe), "--run.name", name, "--run.resume", "true"]
