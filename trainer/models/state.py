"""The activations between two blocks of a video diffusion transformer.

Legend: B batch, F latent frames, H W latent grid, N vision tokens, L text tokens, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from trainer.models.layout import TokenLayout


@dataclass(frozen=True)
class State:
    """The activations between two blocks.

    Args:
        vision: (B, N, D) vision stream.
        text: (B, L, D_text) text stream.
        temb: (B, ...) what modulates every block: the timestep, and what a family adds to it.
        rope: rotary tables, float32; empty for a family whose positions are added to the tokens.
        layout: token order of the batch.
        size: (F, H, W) of the latent, needed to put patches back.
        out_temb: (B, D) what modulates the output norm, where that is not `temb`.
    """

    vision: Tensor
    text: Tensor
    temb: Tensor
    rope: tuple[Tensor, ...]
    layout: TokenLayout
    size: tuple[int, int, int]
    out_temb: Tensor | None = None

    def with_streams(self, vision: Tensor, text: Tensor) -> "State":
        """The state after a block."""
        return replace(self, vision=vision, text=text)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "State":
        """The same state with `fn` applied to its tensors."""
        mask = self.layout.key_mask
        return replace(
            self,
            vision=fn(self.vision),
            text=fn(self.text),
            temb=fn(self.temb),
            rope=tuple(fn(table) for table in self.rope),
            layout=replace(self.layout, key_mask=None if mask is None else fn(mask)),
            out_temb=None if self.out_temb is None else fn(self.out_temb),
        )

    def detach(self) -> "State":
        """The same state, detached from the autograd graph."""
        return self.map(Tensor.detach)
