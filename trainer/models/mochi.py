"""Mochi: joint attention over [vision | text], both streams of their own weights.

Legend: B batch, C channels, F latent frames, H W latent grid, N vision tokens, L text tokens, D width, h heads,
d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import MochiTransformer3DModel
from diffusers.models.attention_processor import MochiAttention, MochiAttnProcessor2_0
from torch import Tensor, nn

from trainer.models.captions import Captions
from trainer.models.facts import ModelFacts
from trainer.models.from_scratch import draw_frequencies
from trainer.models.layout import TokenLayout, text_lengths_of
from trainer.models.process import RectifiedFlow
from trainer.models.split_model import ObservedAttention, SplitModel
from trainer.models.state import State


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs of x (B, N, h, d), in float32 as Mochi has it."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class JointAttention(ObservedAttention):
    """Attention processor of one Mochi block, without a loop over the batch or a wait for the device.

    Takes the place of diffusers' `MochiAttnProcessor2_0`, which gathers the valid text of each sample with `nonzero`.
    `attention_mask` is a `TokenLayout`, or a (B, L) mask as `MochiPipeline` passes it.
    """

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
        out = self.attention(q, k, v, layout).transpose(1, 2).flatten(2, 3)

        vision_out = attn.to_out[1](attn.to_out[0](out[:, : layout.num_vision]))
        text_out = torch.nn.functional.pad(out[:, layout.num_vision :], (0, 0, 0, padded - layout.text_tokens))
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return vision_out, text_out


class SplitMochi(SplitModel):
    """A Mochi transformer that can be run in parts: Args as of `SplitModel`."""

    family = "Mochi"
    transformer_class = MochiTransformer3DModel
    processor_class = JointAttention
    stock_processor_class = MochiAttnProcessor2_0
    never_trained = ("pos_frequencies",)
    process = RectifiedFlow(towards_data=True)

    @staticmethod
    def facts(config: Mapping[str, Any]) -> ModelFacts:
        patch = config["patch_size"]
        return ModelFacts(
            SplitMochi.family,
            config["num_layers"],
            config["in_channels"],
            config["text_embed_dim"],
            (1, patch, patch),
            empty_caption="nothing",
            longest_caption=config["max_sequence_length"],
        )

    @staticmethod
    def blocks_of(transformer: MochiTransformer3DModel) -> Sequence[nn.Module]:
        return transformer.transformer_blocks

    @staticmethod
    def output_parts(transformer: MochiTransformer3DModel) -> Sequence[nn.Module | nn.Parameter]:
        return transformer.norm_out, transformer.proj_out

    @staticmethod
    def starts_at_zero(block: nn.Module, name: str) -> bool:
        # Zero modulation means zero gates: the block starts as the identity. The output projection must not start at
        # zero: an RMS norm follows it, whose gradient at zero input is 1 / sqrt(1e-6) = 1,000 times as large.
        return name.startswith(("norm1.", "norm1_context."))

    def draw_positions(self, seed: int) -> None:
        draw_frequencies(self.transformer, seed)

    def changes_text(self, layer: int) -> bool:
        return not self.blocks[layer].context_pre_only  # the last block leaves the text as it is

    def embed(self, x: Tensor, timestep: Tensor, captions: Captions) -> State:
        self.check_sizes(x, captions)
        batch, _, frames, height, width = x.shape
        transformer, patch = self.transformer, self.transformer.config.patch_size
        temb, text = transformer.time_embed(timestep, captions.text, captions.mask, hidden_dtype=x.dtype)
        patches = transformer.patch_embed(x.permute(0, 2, 1, 3, 4).flatten(0, 1))
        grid = (frames, height // patch, width // patch)
        rope = transformer.rope(transformer.pos_frequencies, *grid, device=x.device, dtype=torch.float32)
        return State(
            vision=patches.unflatten(0, (batch, -1)).flatten(1, 2),
            text=text,
            temb=temb,
            rope=rope,
            layout=self._layout(grid, captions.lengths, captions.mask),
            size=(frames, height, width),
        )

    def _layout(self, grid: tuple[int, int, int], lengths: tuple[int, ...], mask: Tensor) -> TokenLayout:
        if self.stock_attention:  # diffusers' processor wants the mask itself
            return TokenLayout(grid, lengths, mask.shape[1], mask)
        return TokenLayout.of(grid, lengths, mask)

    def run_block(self, block: Callable[..., Any], state: State) -> State:
        mask = state.layout.key_mask if self.stock_attention else state.layout
        vision, text = block(state.vision, state.text, state.temb, mask, state.rope)
        return state.with_streams(vision, text)

    def finish(self, state: State) -> Tensor:
        frames, height, width = state.size
        batch, patch = state.vision.shape[0], self.transformer.config.patch_size
        out = self.transformer.proj_out(self.transformer.norm_out(state.vision, state.temb))
        out = out.reshape(batch, frames, height // patch, width // patch, patch, patch, -1)
        return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, -1, frames, height, width)
