"""Captions of Wan 2.1: umT5, the valid tokens only. The transformer pads them with zeros, which take part."""

from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor
from transformers import UMT5EncoderModel

from data.encode.captions.caption_encoder import CaptionEncoder


class WanCaptions(CaptionEncoder):
    """Captions of Wan 2.1, by diffusers' pipeline."""

    text_encoder_class = UMT5EncoderModel

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, max_tokens: int) -> None:
        super().__init__(folder, device, dtype, max_tokens)
        self.pipeline = WanPipeline(
            tokenizer=self.tokenizer, text_encoder=self.text_encoder, vae=None, scheduler=None, transformer=None
        )

    def text(self, caption: str) -> Tensor:
        # The pipeline cleans the caption before it counts its tokens.
        tokens = self.tokenizer(prompt_clean(caption), truncation=True, max_length=self.max_tokens).input_ids
        embeddings, _ = self.pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=len(tokens), device=self.device
        )
        return embeddings[0]
