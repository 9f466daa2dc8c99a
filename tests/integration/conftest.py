"""A tiny world on disk for whole commands: a complete base pipeline, latent shards, a recipe."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderKLMochi

from launch.demo.assemble_base import pipeline
from tests.support.fork_server import Process, popen
from tests.support.latent_shards import write_latents
from tests.support.run_rows import EPOCHS

BUCKET, TEXT_WIDTH = "7x32x32", 16
VAE = {
    "latent_channels": 4, "encoder_block_out_channels": [32] * 4, "decoder_block_out_channels": [32] * 4,
    "layers_per_block": [1, 1, 1, 1, 1], "add_attention_block": [False] * 5, "temporal_expansions": [1, 2, 3],
    "spatial_expansions": [2, 2, 2], "act_fn": "silu", "in_channels": 15, "out_channels": 3,
}  # fmt: skip


@pytest.fixture(scope="session")
def whole_base(tmp_path_factory, make_transformer) -> Path:
    """A complete tiny pipeline folder with random weights. Not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    AutoencoderKLMochi(**VAE, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).save_pretrained(folder / "vae")
    model = make_transformer(3)
    (folder / "transformer.json").write_text(json.dumps({"_class_name": "MochiTransformer3DModel", **model.config}))
    pipeline(folder / "base", vae=folder / "vae", transformer_config=folder / "transformer.json", half=False)
    model.save_pretrained(folder / "base" / "transformer")
    return folder / "base"


@pytest.fixture(scope="session")
def latents(tmp_path_factory) -> Callable[..., Path]:
    """(bucket, text_width, channels) -> a folder of latent shards of 40 samples."""

    def write(bucket=BUCKET, text_width=TEXT_WIDTH, channels=4) -> Path:
        path = tmp_path_factory.mktemp("latents")
        generator = torch.Generator().manual_seed(0)
        write_latents(
            path, [(bucket, 8)] * 5, channels=channels, width=text_width,
            latent=lambda i, shape: torch.randn(shape, generator=generator),
            text=lambda i: torch.randn(i % 4, text_width, generator=generator),
        )  # fmt: skip
        return path

    return write


@pytest.fixture(scope="session")
def shards(latents) -> Path:
    return latents()


def _measurement(name: str, prompts: int) -> dict:
    options = {"prompts": prompts, "sigmas": [0.25, 0.75]} | ({"ratios": [0.5]} if name == "MaskingRobustness" else {})
    return {"class_path": f"tests.support.undrawn.{name}", "init_args": options}


@pytest.fixture(scope="session")
def write_recipe(whole_base, shards) -> Callable[..., Path]:
    """(folder, measure) -> a recipe.yaml in `folder` that retrains blocks 1 and 2 of the tiny base, without figures."""

    def write(folder: Path, *, measure: bool = True, epochs: int = EPOCHS, workers: int = 0, base=whole_base) -> Path:
        recipe = {
            "run": {"name": "tiny", "root": str(folder / "runs"), "save_every": 3, "wandb": False},
            "seed_everything": 0,
            "trainer": {
                "accelerator": "cpu", "devices": 1, "precision": "32-true", "max_epochs": epochs,
                "enable_model_summary": False,
                "callbacks": [_measurement(n, 2) for n in ("SinkFrequency", "MaskingRobustness")] if measure else [],
            },
            "model": {
                "class_path": "trainer.module.RetrainBlocks",
                "init_args": {
                    "base": str(base), "surgery": {"last": 2}, "ema_decay": 0.9, "caption_dropout": 0.3,
                    "optim": {"lr": 0.003, "warmup_steps": 5},
                },
            },
            "data": {
                "class_path": "data.modules.latents.LatentDataModule",
                "init_args": {"shards": str(shards), "val_samples": 8, "batch_size": 4, "num_workers": workers},
            },
        }  # fmt: skip
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write


@pytest.fixture(scope="session")
def reblock() -> Callable[..., Process]:
    """(log, *arguments) -> the command, started in a process group of its own, its output in the file `log`."""

    def start(log: Path, *arguments: str | Path) -> Process:
        code = "from launch.main import main; main()"
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
        with log.open("w") as out:
            return popen(
                [sys.executable, "-c", code, *map(str, arguments)],
                cwd=log.parent, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    return start
