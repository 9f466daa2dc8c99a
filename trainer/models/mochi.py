"""Mochi in three parts (embed, run blocks i..j, finish), and the place where attention is observed and changed.

The composition `finish(run(embed(...), 0, num_blocks))` is diffusers' `MochiTransformer3DModel.forward`, cut into three
so that the trunk can run without autograd and apart from the head.

Legend: B batch, C channels, F latent frames, H W latent grid, N vision tokens, L text tokens, D width, h heads,
d head width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import torch
import torch.utils.checkpoint
from diffusers import MochiTransformer3DModel
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from torch import Tensor, nn

from trainer.models.layout import (
    AttentionCall,
    AttentionFunction,
    TokenLayout,
    dense_attention,
    fused_attention,
    text_lengths_of,
)


@dataclass(frozen=True)
class State:
    """The activations between two blocks.

    Args:
        vision: (B, N, D) vision stream.
        text: (B, L, D_text) text stream.
        temb: (B, D) timestep and pooled caption, which modulates every block.
        rope: cos and sin, each (N, h, d / 2), float32.
        layout: token order of the batch.
        size: (F, H, W) of the latent, needed to put patches back.
    """

    vision: Tensor
    text: Tensor
    temb: Tensor
    rope: tuple[Tensor, Tensor]
    layout: TokenLayout
    size: tuple[int, int, int]

    def map(self, fn) -> "State":
        """The same state with `fn` applied to its tensors."""
        mask = self.layout.key_mask
        return replace(
            self,
            vision=fn(self.vision),
            text=fn(self.text),
            temb=fn(self.temb),
            rope=(fn(self.rope[0]), fn(self.rope[1])),
            layout=replace(self.layout, key_mask=None if mask is None else fn(mask)),
        )

    def detach(self) -> "State":
        """The same state, detached from the autograd graph."""
        return self.map(Tensor.detach)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs of x (B, N, h, d), in float32 as Mochi has it."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class JointAttention:
    """Attention processor of one Mochi block, without a loop over the batch or a wait for the device.

    Takes the place of diffusers' `MochiAttnProcessor2_0`, which gathers the valid text of each sample with `nonzero`.
    `attention_mask` is a `TokenLayout`, or a (B, L) mask as `MochiPipeline` passes it.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.attend: AttentionFunction = dense_attention

    def __call__(
        self,
        attn: MochiAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        layout = attention_mask
        if isinstance(layout, Tensor):
            # Callers that hold only a mask have no grid either: N in one row is enough for attention.
            layout = TokenLayout.of((1, 1, hidden_states.shape[1]), text_lengths_of(layout), layout)
        heads = attn.heads
        padded = encoder_hidden_states.shape[1]
        text = encoder_hidden_states[:, : layout.text_tokens]

        q = _rotate(attn.norm_q(attn.to_q(hidden_states).unflatten(2, (heads, -1))), *image_rotary_emb)
        k = _rotate(attn.norm_k(attn.to_k(hidden_states).unflatten(2, (heads, -1))), *image_rotary_emb)
        v = attn.to_v(hidden_states).unflatten(2, (heads, -1))
        text_q = attn.norm_added_q(attn.add_q_proj(text).unflatten(2, (heads, -1)))
        text_k = attn.norm_added_k(attn.add_k_proj(text).unflatten(2, (heads, -1)))
        text_v = attn.add_v_proj(text).unflatten(2, (heads, -1))

        q, k, v = (
            torch.cat(pair, dim=1).transpose(1, 2) for pair in ((q, text_q), (k, text_k), (v, text_v))
        )  # (B, h, N + L, d)
        if self.attend is dense_attention:
            # Without the layer's number: a constant that differs would have torch.compile make a graph of every block.
            out = fused_attention(q, k, v, layout.key_mask)
        else:
            out = self.attend(q, k, v, AttentionCall(self.layer, layout))
        out = out.transpose(1, 2).flatten(2, 3)

        vision_out = attn.to_out[1](attn.to_out[0](out[:, : layout.num_vision]))
        text_out = torch.nn.functional.pad(out[:, layout.num_vision :], (0, 0, 0, padded - layout.text_tokens))
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return vision_out, text_out


class SplitModel(nn.Module):
    """A Mochi transformer that can be run in parts.

    Args:
        transformer: diffusers' model; its weights are used in place, never copied.
        stock_attention: keep diffusers' own attention processor (bit-equal to its forward; slower, cannot be observed).
        checkpoint_blocks: recompute a block's activations in the backward pass instead of keeping them.
    """

    def __init__(
        self,
        transformer: MochiTransformer3DModel,
        *,
        stock_attention: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.checkpoint_blocks = checkpoint_blocks
        self.stock_attention = stock_attention
        self._processors: list[JointAttention] = []
        for layer, block in enumerate(transformer.transformer_blocks):
            if stock_attention:
                block.attn1.processor = MochiAttnProcessor2_0()
            else:
                self._processors.append(JointAttention(layer))
                block.attn1.processor = self._processors[-1]

    @property
    def num_blocks(self) -> int:
        """Transformer blocks of the model."""
        return len(self.transformer.transformer_blocks)

    @property
    def num_heads(self) -> int:
        """Attention heads per block."""
        return self.transformer.config.num_attention_heads

    @property
    def latent_channels(self) -> int:
        """C, channels of the latents that the model takes."""
        return self.transformer.config.in_channels

    @property
    def text_width(self) -> int:
        """Width of the caption embeddings that the model takes."""
        return self.transformer.config.text_embed_dim

    def embed(
        self,
        x: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor,
        text_lengths: tuple[int, ...],
    ) -> State:
        """Embeds patches, timestep and captions, and makes the rotary tables.

        Args:
            x: (B, C, F, H, W) noisy latents.
            timestep: (B,) float32, 1000 * (1 - sigma).
            text: (B, L, D_text) caption embeddings.
            text_mask: (B, L) bool.
            text_lengths: valid text tokens per sample, on the host.

        Raises:
            ValueError: if a length does not fit the batch or the latent's height or width is not even.
        """
        batch, _, frames, height, width = x.shape
        if len(text_lengths) != batch or max(text_lengths) > text.shape[1]:
            raise ValueError(
                f"got text lengths {text_lengths} for {batch} samples of {text.shape[1]} text tokens; "
                "expected one length per sample, none above the padded length."
            )
        transformer, patch = self.transformer, self.transformer.config.patch_size
        if height % patch or width % patch:
            raise ValueError(
                f"got a latent of {height} x {width}, expected multiples of {patch}: "
                f"use frames whose height and width are multiples of {8 * patch}."
            )
        temb, text = transformer.time_embed(timestep, text, text_mask, hidden_dtype=x.dtype)
        patches = transformer.patch_embed(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
        grid = (frames, height // patch, width // patch)
        rope = transformer.rope(transformer.pos_frequencies, *grid, device=x.device, dtype=torch.float32)
        return State(
            vision=patches.unflatten(0, (batch, -1)).flatten(1, 2),
            text=text,
            temb=temb,
            rope=rope,
            layout=self._layout(grid, text_lengths, text_mask),
            size=(frames, height, width),
        )

    def _layout(self, grid: tuple[int, int, int], lengths: tuple[int, ...], mask: Tensor) -> TokenLayout:
        if self.stock_attention:  # diffusers' processor wants the mask itself
            return TokenLayout(grid, lengths, mask.shape[1], mask)
        return TokenLayout.of(grid, lengths, mask)

    def run(self, state: State, start: int, stop: int) -> State:
        """Runs the blocks start .. stop - 1."""
        for layer, block in enumerate(self.transformer.transformer_blocks[start:stop], start):
            if self.checkpoint_blocks and torch.is_grad_enabled():
                contexts = functools.partial(self._checkpoint_contexts, layer)
                call = functools.partial(
                    torch.utils.checkpoint.checkpoint, block, use_reentrant=False, context_fn=contexts
                )
                state = self.run_block(call, state)
            else:
                state = self.run_block(block, state)
        return state

    def run_block(self, block: Callable[..., tuple[Tensor, Tensor]], state: State) -> State:
        """Runs one block, of this model or of another of its class."""
        mask = state.layout.key_mask if self.stock_attention else state.layout
        vision, text = block(state.vision, state.text, state.temb, mask, state.rope)
        return replace(state, vision=vision, text=text)

    def _checkpoint_contexts(self, layer: int) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a block's forward pass and of its recomputation.

        The backward pass may come after `attention` has ended; it must use the functions of the forward pass.
        """
        if self.stock_attention:
            return contextlib.nullcontext(), contextlib.nullcontext()
        return contextlib.nullcontext(), self.attention({layer: self._processors[layer].attend})

    def finish(self, state: State) -> Tensor:
        """The velocity, (B, C, F, H, W)."""
        frames, height, width = state.size
        batch, patch = state.vision.shape[0], self.transformer.config.patch_size
        out = self.transformer.proj_out(self.transformer.norm_out(state.vision, state.temb))
        out = out.reshape(batch, frames, height // patch, width // patch, patch, patch, -1)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)

    def forward(
        self, x: Tensor, timestep: Tensor, text: Tensor, text_mask: Tensor, text_lengths: tuple[int, ...]
    ) -> Tensor:
        """Runs the whole model: embed, every block, finish; gives the velocity (B, C, F, H, W)."""
        state = self.embed(x, timestep, text, text_mask, text_lengths)
        return self.finish(self.run(state, 0, self.num_blocks))

    @contextlib.contextmanager
    def attention(self, functions: Mapping[int, AttentionFunction]) -> Iterator[None]:
        """Inside, the blocks named by `functions` use them as their attention.

        Afterwards, also when something raises, they use what they had before.

        Raises:
            ValueError: if a layer does not exist or the stock processor is in place.
        """
        if self.stock_attention:
            raise ValueError("attention cannot be observed with stock_attention=True; build the SplitModel without it.")
        unknown = sorted(set(functions) - set(range(self.num_blocks)))
        if unknown:
            raise ValueError(f"got attention functions for layers {unknown}, expected 0 .. {self.num_blocks - 1}.")
        before = {layer: self._processors[layer].attend for layer in functions}
        try:
            for layer, function in functions.items():
                self._processors[layer].attend = function
            yield
        finally:
            for layer, function in before.items():
                self._processors[layer].attend = function

    def output_projection(self, layer: int) -> Tensor:
        """The vision output projection split by head, (h, d, D): the attention output is sum_h v_h @ W_h + bias."""
        weight = self.transformer.transformer_blocks[layer].attn1.to_out[0].weight  # (D, h * d)
        return weight.detach().T.unflatten(0, (self.num_heads, -1))
