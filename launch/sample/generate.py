"""Samples videos from a pipeline folder, optionally with other attention functions in some layers.

Legend: T frames, H W pixels, B batch, h heads, d head width, N vision tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.utils import logging as diffusers_logging
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from transformers.utils import logging as transformers_logging

from data.bucket import check_size
from data.families import VideoFamily
from launch.sample.pipelines import load_pipeline, pipeline_use
from trainer.attention import masked_attention, pooled_quantiles
from trainer.models.families import split_model_of
from trainer.models.layout import AttentionCall, AttentionFunction

#: PSNR in dB of identical videos, since JSON has no infinity.
IDENTICAL_DB = 100.0

Pixels = NDArray[np.uint8]  # (T, H, W, 3)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings that determine a video, besides its caption and its model.

    Args:
        seed: noise seed of the first caption.
        steps: number of denoising steps.
        guidance: scale of classifier-free guidance, 1 turns it off; for HunyuanVideo of the embedded guidance.
        frames: number of frames per video, a multiple of the family's step and 1 more.
        height: height in pixels, a multiple of 16.
        width: width in pixels, a multiple of 16.
        fps: frames per second of the file.
        dtype: dtype of the weights, float32 or bfloat16.
    """

    seed: int
    steps: int
    guidance: float
    frames: int
    height: int
    width: int
    fps: int
    dtype: str

    def check(self, family: VideoFamily) -> None:
        """Checks the settings for a family.

        Raises:
            ValueError: if it does not take them; it names all invalid ones.
        """
        faults = []
        try:
            check_size(self.frames, self.height, self.width, family.name)
        except ValueError as error:
            faults.append(str(error).removesuffix("."))
        if self.steps < 2:
            faults.append(f"got steps {self.steps}, expected at least 2")
        if self.dtype not in ("float32", "bfloat16"):
            faults.append(f"got dtype {self.dtype!r}, expected 'float32' or 'bfloat16'")
        if faults:
            raise ValueError(f"with a base of {family.title}: " + "; ".join(faults) + ".")


def bottom_masked(ratio: float) -> AttentionFunction:
    """Attention function that removes the share `ratio` of each head's smallest weights.

    Each call measures the thresholds, for each sample by itself and over all weights between its tokens. Text that is
    padded is left out where it is no key (Mochi, HunyuanVideo), and counts where it is (CogVideoX). Wan's layers are
    masked in self-attention; cross-attention stays dense.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        out = torch.zeros_like(v)
        for row, length in enumerate(call.layout.text_lengths):
            valid = call.layout.num_vision + length
            q_row, k_row, v_row = (x[row : row + 1, :, :valid] for x in (q, k, v))  # (1, h, valid, d)
            thresholds = pooled_quantiles(q_row, k_row, [ratio])[..., 0]
            out[row, :, :valid] = masked_attention(q_row, k_row, v_row, thresholds)[0][0]
        return out

    return attend


def psnr_and_ssim(video: Pixels, dense: Pixels) -> tuple[float, float]:
    """PSNR in dB (at most `IDENTICAL_DB`) and SSIM over all frames, with the dense video as the reference."""
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (video, dense))  # (T, 3, H, W)
    psnr = float(peak_signal_noise_ratio(a, b, data_range=1.0))
    ssim = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a tuple only when asked for the full image
    return min(psnr, IDENTICAL_DB), float(ssim)


class VideoSampler:
    """Samples videos from one pipeline folder, which is loaded once.

    Args:
        folder: complete diffusers pipeline folder of any family.
        config: settings of every video.
        device: torch device to sample on.
    """

    def __init__(self, folder: Path, config: SamplingConfig, device: str) -> None:
        self.config, self.device = config, torch.device(device)
        diffusers_logging.disable_progress_bar()  # the bars for loading would disturb ours
        transformers_logging.disable_progress_bar()
        self.use = pipeline_use(folder)
        self.pipe = load_pipeline(folder, getattr(torch, config.dtype), self.device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.vae.enable_tiling()  # no effect on small frames; larger ones need it to fit into memory
        self.split_model = split_model_of(self.pipe.transformer)

    def sample(
        self, caption: str, seed: int, functions: Mapping[int, AttentionFunction], on_step: Callable[[], None]
    ) -> Pixels:
        """Samples a video, (T, H, W, 3) uint8.

        Args:
            caption: caption of the video; it may be empty.
            seed: seed of the noise.
            functions: attention functions by layer, which replace dense attention.
            on_step: function to call after every denoising step.
        """
        return self.sample_batch([caption], [seed], functions, on_step)[0]

    @torch.no_grad()
    def sample_batch(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        functions: Mapping[int, AttentionFunction],
        on_step: Callable[[], None],
    ) -> list[Pixels]:
        """Samples videos in one batch: in every call of the transformer, a pass has a row for each caption, in order.

        Args:
            captions: of the videos.
            seeds: of the noise of each; equal seeds give equal noise.
            functions: as of `sample`.
            on_step: as of `sample`.
        """
        config = self.config

        def after_step(pipe: Any, step: int, timestep: Tensor, tensors: dict) -> dict:
            on_step()
            return {}

        with self.split_model.attention(functions):
            videos = self.pipe(
                **self.use.arguments(self.pipe, list(captions), config.guidance),
                num_frames=config.frames,
                height=config.height,
                width=config.width,
                num_inference_steps=config.steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                callback_on_step_end=after_step,
                output_type="np",
            ).frames
        return [(np.asarray(video, np.float32) * 255).round().clip(0, 255).astype(np.uint8) for video in videos]
