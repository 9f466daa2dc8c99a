"""Wan 2.1: self-attention over vision, captions by cross-attention, modulation from a table in every block.

Legend: B batch, F latent frames, H W latent grid, N vision tokens, L text tokens, D width, h heads, d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch import Tensor, nn

from trainer.models.captions import Captions
from trainer.models.facts import ModelFacts, check_text_to_video
from trainer.models.layout import Site, TokenLayout
from trainer.models.process import RectifiedFlow
from trainer.models.split_model import ObservedAttention, SplitModel
from trainer.models.state import State

#: Text tokens that the cross-attention sees. Captions are padded to it with zeros, which take part.
TEXT_TOKENS = 512


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs of x (B, N, h, d), with tables (1, N, 1, d)."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


def _normalised(norm: Any, x: Tensor) -> Tensor:
    """RMS norm of x in float32, in x's dtype.

    Where the weight has another dtype than x, as float32 weights have under autocast, torch would leave its fused
    kernel and give a float32 result.
    """
    if norm.weight.dtype == x.dtype:
        return norm(x)
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps).type_as(x)


class SelfOrCrossAttention(ObservedAttention):
    """Attention processor of one of a block's two attentions; takes the place of diffusers' `WanAttnProcessor`.

    `SplitWan` passes the token layout through arguments that the block hands on untouched. Self-attention has
    `rotary_emb` (cos, sin, layout); cross-attention has no argument but the text, `encoder_hidden_states` (text,
    layout). As `WanTransformer3DModel` passes them, they are (cos, sin), and the text alone.
    """

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor, TokenLayout] | Tensor | None,
        attention_mask: Tensor | None,
        rotary_emb: tuple[Any, ...] | None,
    ) -> Tensor:
        keys, text_tokens, rope = hidden_states, 0, rotary_emb or ()
        layout = rope[2] if len(rope) == 3 else None
        if encoder_hidden_states is not None:  # cross-attention
            text = encoder_hidden_states
            keys, layout = text if isinstance(text, tuple) else (text, None)
            text_tokens = keys.shape[1]
        if layout is None:  # diffusers' forward knows neither grid nor lengths of captions
            lengths = (text_tokens,) * len(hidden_states)
            layout = TokenLayout((1, 1, hidden_states.shape[1]), lengths, text_tokens, None)
        # The norms are over all heads together.
        q, k = _normalised(attn.norm_q, attn.to_q(hidden_states)), _normalised(attn.norm_k, attn.to_k(keys))
        v = attn.to_v(keys)
        q, k, v = (part.unflatten(2, (attn.heads, -1)) for part in (q, k, v))
        if rope:
            q, k = _rotate(q, *rope[:2]), _rotate(k, *rope[:2])
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = self.attention(q, k, v, layout).transpose(1, 2).flatten(2, 3)
        return attn.to_out[1](attn.to_out[0](out))


class SplitWan(SplitModel):
    """A Wan 2.1 text-to-video transformer that can be run in parts: Args as of `SplitModel`."""

    family = "Wan 2.1"
    transformer_class = WanTransformer3DModel
    attention_sites: ClassVar[Mapping[Site, str]] = {"self": "attn1", "cross": "attn2"}
    processor_class = SelfOrCrossAttention
    stock_processor_class = WanAttnProcessor
    process = RectifiedFlow(towards_data=False)

    @staticmethod
    def facts(config: Mapping[str, Any]) -> ModelFacts:
        check_text_to_video(config, SplitWan.family)
        if config["image_dim"] is not None or config["added_kv_proj_dim"] is not None:
            raise ValueError(
                f"got image_dim {config['image_dim']} and added_kv_proj_dim {config['added_kv_proj_dim']}, expected a "
                "Wan 2.1 of text to video, which has neither."
            )
        frames, height, width = config["patch_size"]
        return ModelFacts(
            SplitWan.family,
            config["num_layers"],
            config["in_channels"],
            config["text_dim"],
            (frames, height, width),
            empty_caption="encoded",
            longest_caption=TEXT_TOKENS,
        )

    @staticmethod
    def blocks_of(transformer: WanTransformer3DModel) -> Sequence[nn.Module]:
        return transformer.blocks

    @staticmethod
    def output_parts(transformer: WanTransformer3DModel) -> Sequence[nn.Module | nn.Parameter]:
        return transformer.norm_out, transformer.proj_out, transformer.scale_shift_table

    @staticmethod
    def starts_at_zero(block: nn.Module, name: str) -> bool:
        # Its gates are the table plus a frozen function of the timestep, so no table makes them zero. No norm follows
        # these output projections.
        return name in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")

    @staticmethod
    def fresh_parameters(block: Any) -> Mapping[str, Callable[[torch.Generator], Tensor]]:
        shape = tuple(block.scale_shift_table.shape)
        # As the authors' model draws it (wan/modules/model.py, WanAttentionBlock).
        return {"scale_shift_table": lambda generator: torch.randn(shape, generator=generator) / shape[-1] ** 0.5}

    def changes_text(self, layer: int) -> bool:
        return False

    def embed(self, x: Tensor, timestep: Tensor, captions: Captions) -> State:
        self.check_sizes(x, captions)
        text = captions.text
        if text.shape[1] > TEXT_TOKENS:
            raise ValueError(f"got captions padded to {text.shape[1]} tokens, expected at most {TEXT_TOKENS}.")
        transformer = self.transformer
        _, _, frames, height, width = x.shape
        text = F.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[1]))
        temb, modulation, text, _ = transformer.condition_embedder(timestep, text, None)
        (p_t, p_h, p_w), cos_sin = self.patch, transformer.rope(x)
        return State(
            vision=transformer.patch_embedding(x).flatten(2).transpose(1, 2).contiguous(),
            text=text,
            temb=modulation.unflatten(1, (6, -1)),
            rope=tuple(cos_sin),
            layout=TokenLayout((frames // p_t, height // p_h, width // p_w), captions.lengths, 0, None),
            size=(frames, height, width),
            out_temb=temb,
        )

    def run_block(self, block: Callable[..., Any], state: State) -> State:
        if self.stock_attention:
            return state.with_streams(block(state.vision, state.text, state.temb, state.rope), state.text)
        text = (state.text, replace(state.layout, text_tokens=state.text.shape[1]))
        return state.with_streams(block(state.vision, text, state.temb, (*state.rope, state.layout)), state.text)

    def finish(self, state: State) -> Tensor:
        transformer, (p_t, p_h, p_w) = self.transformer, self.patch
        assert state.out_temb is not None
        shift, scale = (transformer.scale_shift_table + state.out_temb.unsqueeze(1)).chunk(2, dim=1)
        out = (transformer.norm_out(state.vision.float()) * (1 + scale) + shift).type_as(state.vision)
        out = transformer.proj_out(out).unflatten(1, state.layout.grid).unflatten(-1, (p_t, p_h, p_w, -1))
        return out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
