"""Token order at the attention sites of a block, and the interface of functions that observe or replace attention.

Legend: B batch, F latent frames, N vision tokens, L text tokens, h heads, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

#: Where a block has attention: vision and text attend to both (`joint`), vision to vision (`self`), to text (`cross`).
Site = Literal["joint", "self", "cross"]


@dataclass(frozen=True)
class TokenLayout:
    """Token order of one batch at one site: [vision | text]; at the site `cross`, vision queries and text keys.

    Vision tokens are in the order (t, y, x). The first `text_lengths[b]` text tokens of sample b are valid.

    Args:
        grid: (F, H, W) of the vision tokens, after patching.
        text_lengths: valid text tokens per sample, known on the host.
        text_tokens: L, text tokens among the keys, padding included where it takes part (CogVideoX, Wan's `cross`);
            elsewhere the longest caption of the batch; 0 at the site `self`.
        key_mask: (B, N + L) bool, true on tokens that may be attended to; None when every caption is L long, so
            that no mask is needed and the fastest kernels apply.
    """

    grid: tuple[int, int, int]
    text_lengths: tuple[int, ...]
    text_tokens: int
    key_mask: Tensor | None

    @property
    def num_vision(self) -> int:
        """N, the number of vision tokens."""
        frames, height, width = self.grid
        return frames * height * width

    @classmethod
    def of(cls, grid: tuple[int, int, int], text_lengths: tuple[int, ...], text_mask: Tensor) -> "TokenLayout":
        """The layout of a batch whose `text_mask` (B, L') is true on the first `text_lengths[i]` tokens of row i."""
        longest = max(text_lengths)
        if all(length == longest for length in text_lengths):
            return cls(grid, text_lengths, longest, None)
        frames, height, width = grid
        key_mask = F.pad(text_mask[:, :longest].bool(), (frames * height * width, 0), value=True)
        return cls(grid, text_lengths, longest, key_mask)


@dataclass(frozen=True)
class AttentionCall:
    """What an attention function gets besides q, k and v: the block's index, the batch's token order, and the site."""

    layer: int
    layout: TokenLayout
    site: Site = "joint"


#: (q, k, v, call) -> what has the shape of q. Shapes at the site `joint`: each (B, h, N + L, d); `self`: each
#: (B, h, N, d); `cross`: q (B, h, N, d), k and v (B, h, L, d).
AttentionFunction = Callable[[Tensor, Tensor, Tensor, AttentionCall], Tensor]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """torch's fused attention; padded text keys are masked where captions differ in length."""
    return fused_attention(q, k, v, call.layout.key_mask)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`dense_attention` with a (B, N + L) key mask in place of the layout."""
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    # diffusers gives zeros at padded text queries; nothing reads them, but equal is easier to trust than equivalent.
    return out * mask[:, None, :, None].to(out.dtype)


def text_lengths_of(text_mask: Tensor) -> tuple[int, ...]:
    """Valid tokens per row of a (B, L) mask. It waits for the device: for callers that do not know the lengths.

    Raises:
        ValueError: if valid tokens are not a prefix of their row.
    """
    mask = text_mask.bool()
    lengths = mask.sum(dim=1)
    prefix = torch.arange(mask.shape[1], device=mask.device)[None, :] < lengths[:, None]
    if not torch.equal(prefix, mask):
        raise ValueError(
            "got a text mask with gaps, expected the valid tokens of every caption first and padding after them. "
            "Sort each caption's tokens so (T5 tokenizers pad on the right)."
        )
    return tuple(lengths.tolist())
