"""The captions of a batch, as a transformer takes them.

Legend: B batch, L text tokens.
"""

from dataclasses import dataclass

from torch import Tensor

from data.batch import Batch


@dataclass(frozen=True)
class Captions:
    """The captions of a batch.

    Args:
        text: (B, L, D_text) embeddings.
        mask: (B, L) bool, true on the first `lengths[b]` tokens of row b.
        lengths: valid text tokens per sample, on the host.
        pooled: (B, D_pooled) pooled embeddings, for a family that takes them.
    """

    text: Tensor
    mask: Tensor
    lengths: tuple[int, ...]
    pooled: Tensor | None = None

    @classmethod
    def of(cls, batch: Batch) -> "Captions":
        """The captions of a batch of latents."""
        return cls(batch.text, batch.text_mask, batch.text_lengths, batch.pooled)
