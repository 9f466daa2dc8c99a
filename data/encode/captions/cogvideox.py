"""Captions of CogVideoX: T5 without a mask, padded to one length. Padding depends on the caption and is attended to."""

from pathlib import Path

import torch
from diffusers import CogVideoXPipeline
from torch import Tensor
from transformers import T5EncoderModel

from data.encode.captions.caption_encoder import CaptionEncoder


class CogVideoXCaptions(CaptionEncoder):
    """Captions of CogVideoX, by diffusers' pipeline; all have `max_tokens` rows."""

    text_encoder_class = T5EncoderModel

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, max_tokens: int) -> None:
        super().__init__(folder, device, dtype, max_tokens)
        self.pipeline = CogVideoXPipeline(
            tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=None, transformer=None, scheduler=None
        )

    def text(self, caption: str) -> Tensor:
        embeddings, _ = self.pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens, device=self.device
        )
        return embeddings[0]
