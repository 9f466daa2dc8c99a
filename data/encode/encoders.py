"""The frozen encoders of a base: clips to latents, captions to embeddings.

Legend: B clips, T video frames, C latent channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

from collections.abc import Sequence
from pathlib import Path

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.base_facts import base_family
from data.base_folder import resolve_base
from data.encode.captions.load import load_caption_encoder
from data.encode.load_part import load_part
from data.encode.stage_timer import COPY, TEXT, VAE, StageTimer


class TextEncoders:
    """The text encoders of a base of any family, frozen.

    Args:
        base: diffusers pipeline folder, or the id of a downloaded hub repository; weights in one file or many.
        device: where they run.
        dtype: of the VAE's weights: embeddings are stored in float16 unless both dtypes are float32.
        max_text_tokens: longer captions are truncated; CogVideoX's are padded to it.
        text_dtype: of the text encoders' weights; Mochi was trained with float32.

    Raises:
        ValueError: if the base is absent, or its weights do not fit its configs.
    """

    def __init__(
        self, base: Path | str, device: str, dtype: torch.dtype, max_text_tokens: int,
        text_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        self.folder = resolve_base(base)
        self.device, self.dtype, self.text_dtype, self.max_text_tokens = device, dtype, text_dtype, max_text_tokens
        self.family = base_family(self.folder)
        self.captions = load_caption_encoder(self.family, self.folder, device, text_dtype, max_text_tokens)
        self.tokenizer, self.text_encoder = self.captions.tokenizer, self.captions.text_encoder
        self.timer = StageTimer(device)

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of each caption, (L, D) on the CPU: of its valid tokens, for CogVideoX of padding too.

        float32 if both encoders are, else float16. L is 0 for an empty caption of Mochi. Each caption is encoded alone.
        """
        embeddings = []
        for caption in captions:
            with self.timer(TEXT):
                hidden = self.captions.text(caption)
            with self.timer(COPY):
                embeddings.append(hidden.to(self._stored_dtype).cpu())
        return embeddings

    @torch.inference_mode()
    def pooled(self, captions: Sequence[str]) -> list[Tensor | None]:
        """Pooled embeddings of each caption, (D,) on the CPU in the dtype of `text`; None where the family has none."""
        embeddings: list[Tensor | None] = []
        for caption in captions:
            with self.timer(TEXT):
                pooled = self.captions.pooled(caption)
            with self.timer(COPY):
                embeddings.append(None if pooled is None else pooled.to(self._stored_dtype).cpu())
        return embeddings

    @property
    def _stored_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == self.text_dtype == torch.float32 else torch.float16


class Encoders(TextEncoders):
    """The VAE's encoder and the text encoders of a base of any family, frozen.

    Args:
        base, device, dtype, max_text_tokens: as of `TextEncoders`.
        tiling: encode clip by clip, and large frames (for most families, above 256 x 256) in overlapping tiles. Memory
            then does not grow with the batch and the frame, and latents differ slightly. Mochi cannot be encoded a few
            frames at a time: the attention of its encoder runs over all frames of a clip, and diffusers refuses to
            split it. diffusers always encodes the other families so.
        text_dtype: of the text encoders' weights; Mochi was trained with float32.

    Raises:
        ValueError: if the base is absent, or its weights do not fit its configs.
    """

    def __init__(
        self, base: Path | str, device: str, dtype: torch.dtype, max_text_tokens: int, tiling: bool = False,
        text_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        super().__init__(base, device, dtype, max_text_tokens, text_dtype)
        kind = getattr(diffusers, self.family.vae)
        self.vae = load_part(kind, self.folder / "vae", torch_dtype=dtype, low_cpu_mem_usage=False)
        self.vae.to(device).eval()
        # Only the encoder is needed; the decoder would double the memory on the host and on the device.
        self.vae.decoder = None
        if tiling:
            self.vae.enable_tiling()
            self.vae.enable_slicing()

    @torch.inference_mode()
    def latents(self, videos: Sequence[NDArray[np.uint8]] | Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior, raw (not normalised), each (B, C, F, H, W) float16 on the CPU.

        Args:
            videos: B clips (T, H, W, 3) of one size, or one tensor (B, T, H, W, 3) of them.
        """
        pixels = videos if isinstance(videos, Tensor) else torch.from_numpy(np.stack(videos))
        with self.timer(COPY):
            pixels = pixels.to(self.device).permute(0, 4, 1, 2, 3)
        with self.timer(VAE):
            posterior = self.vae.encode(pixels.to(self.dtype) / 127.5 - 1).latent_dist
        with self.timer(COPY):
            return posterior.mean.half().cpu(), posterior.logvar.half().cpu()
