"""What every family's encoder of captions offers.

Legend: L text tokens, D text width.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from data.encode.load_part import load_part


class CaptionEncoder(ABC):
    """Encodes captions as the family's transformer takes them.

    Each caption is encoded alone and, where the family drops or masks padding, at its own length. So its embedding does
    not depend on the other captions, to the bit, and no padding is computed.

    Args:
        folder: of the base.
        device: where the text encoder runs.
        dtype: of its weights.
        max_tokens: longer captions are truncated.
    """

    #: transformers' class of the text encoder.
    text_encoder_class: Any

    def __init__(self, folder: Path, device: str, dtype: torch.dtype, max_tokens: int) -> None:
        self.device, self.max_tokens = device, max_tokens
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self.text_encoder = load_part(self.text_encoder_class, folder / "text_encoder", dtype=dtype).to(device).eval()

    @abstractmethod
    def text(self, caption: str) -> Tensor:
        """The embedding of a caption, (L, D) on the device."""

    def pooled(self, caption: str) -> Tensor | None:
        """The pooled embedding of a caption, (D,) on the device; None for a family without one."""
        return None
