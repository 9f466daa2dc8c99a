"""Drawing one video with a pipeline folder, its attention changed in chosen layers if wanted.

Legend: T frames, H W pixels, B batch, h heads, d head width, N vision tokens.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import MochiPipeline
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from trainer.attention import masked_attention, pooled_quantiles
from trainer.models.layout import AttentionCall, AttentionFunction
from trainer.models.mochi import SplitModel

#: PSNR of equal videos: infinity is no JSON number.
IDENTICAL_DB = 100.0

Pixels = NDArray[np.uint8]  # (T, H, W, 3)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a video is a function of, besides its caption and its model."""

    seed: int
    steps: int
    guidance: float
    frames: int
    height: int
    width: int
    fps: int
    dtype: str

    def check(self) -> None:
        """Raises ValueError, naming every fault at once."""
        faults = []
        if self.frames < 1 or self.frames % 6 != 1:
            faults.append(f"frames {self.frames} (expected 6k + 1: 7, 13, 19, ...)")
        if self.height < 16 or self.width < 16 or self.height % 16 or self.width % 16:
            faults.append(f"size {self.height} x {self.width} (expected multiples of 16)")
        if self.steps < 2:
            faults.append(f"steps {self.steps} (expected at least 2)")
        if self.dtype not in ("float32", "bfloat16"):
            faults.append(f"dtype {self.dtype!r} (expected 'float32' or 'bfloat16')")
        if faults:
            raise ValueError("got " + "; ".join(faults) + ".")


def bottom_masked(ratio: float) -> AttentionFunction:
    """Attention whose smallest weights are removed, `ratio` of them per head; thresholds are taken on the spot.

    Every sample is treated by itself, over its valid tokens only: padded text has no weights to rank.
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


def likeness(video: Pixels, dense: Pixels) -> tuple[float, float]:
    """PSNR in dB (at most `IDENTICAL_DB`) and SSIM of a video against the dense one, over all frames."""
    a, b = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 for x in (video, dense))  # (T, 3, H, W)
    psnr = float(peak_signal_noise_ratio(a, b, data_range=1.0))
    ssim = structural_similarity_index_measure(a, b, data_range=1.0)
    assert isinstance(ssim, Tensor)  # a tuple only when asked for the full image
    return min(psnr, IDENTICAL_DB), float(ssim)


class Painter:
    """One pipeline folder, loaded once, that draws videos.

    Args:
        folder: a complete diffusers Mochi pipeline.
        settings: of every video.
        device: torch device.
    """

    def __init__(self, folder: Path, settings: Settings, device: str) -> None:
        self.settings, self.device = settings, torch.device(device)
        self.dtype = getattr(torch, settings.dtype)
        pipe = MochiPipeline.from_pretrained(folder, torch_dtype=self.dtype, local_files_only=True)
        self.pipe = pipe.to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.vae.enable_tiling()  # does nothing up to 256 pixels; past that, whole frames would not fit
        self.split_model = SplitModel(self.pipe.transformer)

    @torch.no_grad()
    def draw(
        self, caption: str, seed: int, functions: Mapping[int, AttentionFunction], tick: Callable[[], None]
    ) -> Pixels:
        """The video of a caption; layers in `functions` attend through them. `tick` is called after every step."""
        s = self.settings

        def after_step(pipe: MochiPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
            tick()
            return {}

        text, mask, _, _ = self.pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        if not caption:
            mask = torch.zeros_like(mask)
        # The pipeline keeps latents and timesteps in the dtype of the embeddings: float32 whatever the weights are.
        text = text.float() * mask[..., None]
        narrow = self.dtype != torch.float32
        with (
            torch.autocast(self.device.type, self.dtype) if narrow else contextlib.nullcontext(),
            self.split_model.attention(functions),
        ):
            video = self.pipe(
                prompt_embeds=text,
                prompt_attention_mask=mask,
                # As captions are dropped in training: zero embedding, zero mask.
                negative_prompt_embeds=torch.zeros_like(text),
                negative_prompt_attention_mask=torch.zeros_like(mask),
                num_frames=s.frames,
                height=s.height,
                width=s.width,
                num_inference_steps=s.steps,
                guidance_scale=s.guidance,
                generator=torch.Generator().manual_seed(seed),
                callback_on_step_end=after_step,
                output_type="np",
            ).frames[0]
        return (np.asarray(video, np.float32) * 255).round().clip(0, 255).astype(np.uint8)
