"""The frozen encoders of a base: clips to latents, captions to embeddings.

Legend: B clips, T video frames, C latent channels, F latent frames, H W latent grid, L text tokens, D text width.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLMochi
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, T5EncoderModel

from data.base_folder import resolve_base
from data.encode.stage_timer import COPY, TEXT, VAE, StageTimer


class Encoders:
    """The VAE's encoder and T5 of a base, frozen.

    Args:
        base: diffusers pipeline folder, or the id of a downloaded hub repository; weights in one file or many.
        device: where they run.
        dtype: of the VAE's weights.
        max_text_tokens: longer captions are truncated.
        tiling: encode clip by clip, and frames above 256 x 256 in overlapping tiles. Memory then does not grow with the
            batch and the frame, and latents differ slightly. Encoding a few frames at a time is not possible: the
            attention of Mochi's encoder runs over all frames of a clip, and diffusers refuses to split it.
        text_dtype: of T5's weights: float32, as Mochi was trained with.

    Raises:
        ValueError: if the base is absent, or its weights do not fit its configs.
    """

    def __init__(
        self, base: Path | str, device: str, dtype: torch.dtype, max_text_tokens: int, tiling: bool = False,
        text_dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        folder = resolve_base(base)
        self.device, self.dtype, self.text_dtype, self.max_text_tokens = device, dtype, text_dtype, max_text_tokens
        self.vae = _load(AutoencoderKLMochi, folder / "vae", torch_dtype=dtype, low_cpu_mem_usage=False)
        self.vae.to(device).eval()
        # Only the encoder is needed; the decoder would double the memory on the host and on the device.
        self.vae.decoder = None
        if tiling:
            self.vae.enable_tiling()
            self.vae.enable_slicing()
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.text_encoder = _load(T5EncoderModel, folder / "text_encoder", dtype=text_dtype).to(device).eval()
        self.timer = StageTimer(device)

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

    @torch.inference_mode()
    def text(self, captions: Sequence[str]) -> list[Tensor]:
        """Embeddings of the valid tokens of each caption, (L, D) on the CPU; L is 0 for an empty caption.

        float32 if both encoders are, else float16. Each caption is encoded alone, at its own length. So its embedding
        does not depend on the other captions, to the bit, and no padding is computed.
        """
        dtype = torch.float32 if self.dtype == self.text_dtype == torch.float32 else torch.float16
        embeddings = []
        for caption in captions:
            if not caption:
                embeddings.append(torch.zeros(0, self.text_encoder.config.d_model, dtype=dtype))
                continue
            tokens = self.tokenizer(caption, truncation=True, max_length=self.max_text_tokens, return_tensors="pt")
            with self.timer(TEXT):
                hidden = self.text_encoder(tokens.input_ids.to(self.device))[0][0]
            with self.timer(COPY):
                embeddings.append(hidden.to(dtype).cpu())
        return embeddings


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    """Loads a model from safetensors. Missing weights are an error here; the libraries would use random ones."""
    try:
        model, facts = kind.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder} cannot be loaded ({error}). Download or copy it again.") from error
    wrong = sorted(map(str, [*facts["missing_keys"], *facts["mismatched_keys"]]))
    if wrong:
        raise ValueError(
            f"the weights in {folder} do not fit its config: {len(wrong)} tensors are missing or of another shape, "
            f"e.g. {wrong[0]}. Download or copy the base again."
        )
    return model
