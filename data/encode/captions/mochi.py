"""Captions of Mochi: T5, the valid tokens only."""

import torch
from torch import Tensor
from transformers import T5EncoderModel

from data.encode.captions.caption_encoder import CaptionEncoder


class MochiCaptions(CaptionEncoder):
    """Captions of Mochi; an empty caption has no token, as in the authors' code (docs/models.md)."""

    text_encoder_class = T5EncoderModel

    def text(self, caption: str) -> Tensor:
        if not caption:
            return torch.zeros(0, self.text_encoder.config.d_model)
        tokens = self.tokenizer(caption, truncation=True, max_length=self.max_tokens, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device))[0][0]
