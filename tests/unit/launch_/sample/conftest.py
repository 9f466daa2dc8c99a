"""Two tiny pipelines, the second of which counts as retrained."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

from data.synth.command import CAPTION_WORDS
from launch.demo.assemble_base import caption_tokenizer, small_text_encoder


def _pipeline(folder: Path, transformer) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            latents_mean=(0.0,) * 12,
            latents_std=(1.0,) * 12,
            layers_per_block=(1, 1, 1, 1, 1),
        )
    tokenizer = caption_tokenizer(CAPTION_WORDS)
    MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=small_text_encoder(len(tokenizer), 16, 0),
        tokenizer=tokenizer,
        transformer=transformer,
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory, make_transformer) -> tuple[Path, Path]:
    """Base, and a "retrained" folder that names block 2."""
    folder = tmp_path_factory.mktemp("pipelines")
    base = _pipeline(folder / "base", make_transformer(0, in_channels=12))
    retrained = _pipeline(folder / "retrained", make_transformer(1, in_channels=12))
    (retrained / "reblock.json").write_text(json.dumps({"blocks": [2], "base": "base", "weights": "ema", "step": 9}))
    return base, retrained
