"""HunyuanVideo: joint attention over [vision | text], in dual-stream blocks, then in single-stream ones.

Legend: B batch, F latent frames, H W latent grid, N vision tokens, L text tokens, D width, h heads, d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0
from torch import Tensor, nn

from trainer.models.captions import Captions
from trainer.models.facts import ModelFacts, check_text_to_video
from trainer.models.layout import Site, TokenLayout
from trainer.models.process import RectifiedFlow
from trainer.models.split_model import ObservedAttention, SplitModel
from trainer.models.state import State

#: Guidance scale that the guidance-distilled model is told: the default of diffusers' and the authors' samplers.
GUIDANCE = 6.0


#: Most tokens of a caption, after the prompt template is cut off: the default of diffusers' and the authors' samplers.
TEXT_TOKENS = 256


def _layout_of(mask: Tensor, vision: int) -> TokenLayout:
    """The layout for a (B, 1, 1, N + L) mask, as diffusers' forward passes it; waits for the device."""
    lengths = tuple((mask[:, 0, 0].sum(dim=1) - vision).tolist())
    return TokenLayout((1, 1, vision), lengths, mask.shape[-1] - vision, mask[:, 0, 0])


class DualAndSingleAttention(ObservedAttention):
    """Attention processor of one block, of either kind; takes the place of diffusers' `HunyuanVideoAttnProcessor2_0`.

    `attention_mask` is a `TokenLayout`, or the (B, 1, 1, N + L) mask of diffusers' forward.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: TokenLayout | Tensor,
        image_rotary_emb: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        vision, text, vision_tokens = hidden_states, encoder_hidden_states, hidden_states.shape[1]
        layout = attention_mask
        if isinstance(layout, Tensor):
            layout = _layout_of(layout, vision_tokens)

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attn.heads, -1))

        q, k, v = attn.norm_q(heads(attn.to_q(vision))), attn.norm_k(heads(attn.to_k(vision))), heads(attn.to_v(vision))
        q, k = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in (q, k))
        if attn.add_q_proj is None:  # a single-stream block: the same weights for text
            text_q, text_k, text_v = (heads(layer(text)) for layer in (attn.to_q, attn.to_k, attn.to_v))
            text_q, text_k = attn.norm_q(text_q), attn.norm_k(text_k)
        else:
            text_q, text_k, text_v = (
                heads(layer(text)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
        q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = self.attention(q, k, v, layout).transpose(1, 2).flatten(2, 3).to(q.dtype)

        vision_out, text_out = out[:, :vision_tokens], out[:, vision_tokens:]
        if attn.to_out is not None:
            vision_out = attn.to_out[1](attn.to_out[0](vision_out))
        if attn.to_add_out is not None:
            text_out = attn.to_add_out(text_out)
        return vision_out, text_out


class SplitHunyuanVideo(SplitModel):
    """A HunyuanVideo text-to-video transformer that can be run in parts: Args as of `SplitModel`.

    Block indices run over the dual-stream blocks, then over the single-stream ones.
    """

    family = "HunyuanVideo"
    transformer_class = HunyuanVideoTransformer3DModel
    attention_sites: ClassVar[Mapping[Site, str]] = {"joint": "attn"}
    processor_class = DualAndSingleAttention
    stock_processor_class = HunyuanVideoAttnProcessor2_0
    process = RectifiedFlow(towards_data=False)

    @staticmethod
    def facts(config: Mapping[str, Any]) -> ModelFacts:
        check_text_to_video(config, SplitHunyuanVideo.family)
        if config["image_condition_type"] is not None:
            raise ValueError(
                f"got image_condition_type {config['image_condition_type']!r}, expected none: a HunyuanVideo of text "
                "to video."
            )
        patch = config["patch_size"]
        return ModelFacts(
            SplitHunyuanVideo.family,
            config["num_layers"] + config["num_single_layers"],
            config["in_channels"],
            config["text_embed_dim"],
            (config["patch_size_t"], patch, patch),
            empty_caption="encoded",
            longest_caption=TEXT_TOKENS,
            pooled_width=config["pooled_projection_dim"],
        )

    @staticmethod
    def blocks_of(transformer: HunyuanVideoTransformer3DModel) -> Sequence[nn.Module]:
        return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]

    @staticmethod
    def output_parts(transformer: HunyuanVideoTransformer3DModel) -> Sequence[nn.Module | nn.Parameter]:
        return transformer.norm_out, transformer.proj_out

    @staticmethod
    def starts_at_zero(block: nn.Module, name: str) -> bool:
        return name in ("norm1.linear", "norm1_context.linear", "norm.linear")  # gates of dual blocks, of single ones

    def changes_text(self, layer: int) -> bool:
        return layer < self.num_blocks - 1  # nothing reads what the last block makes of the text

    def embed(self, x: Tensor, timestep: Tensor, captions: Captions) -> State:
        self.check_sizes(x, captions)
        if min(captions.lengths) == 0:
            raise ValueError(
                "got a caption without tokens, expected the encoded empty caption in its place: the mean over no "
                "tokens in HunyuanVideo's text refiner is no number."
            )
        assert captions.pooled is not None
        transformer, (p_t, p_h, p_w) = self.transformer, self.patch
        batch, _, frames, height, width = x.shape
        guidance = (
            torch.full((batch,), 1000.0 * GUIDANCE, device=x.device) if transformer.config.guidance_embeds else None
        )
        temb, _ = transformer.time_text_embed(timestep, captions.pooled.to(x.dtype), guidance)
        text = transformer.context_embedder(captions.text, timestep, captions.mask)
        grid = (frames // p_t, height // p_h, width // p_w)
        vision = transformer.x_embedder(x)
        if self.stock_attention:  # diffusers' blocks take padded text and a mask
            mask = torch.cat([captions.mask.new_ones(batch, vision.shape[1]), captions.mask], dim=1)
            layout = TokenLayout(grid, captions.lengths, text.shape[1], mask)
        else:
            layout = TokenLayout.of(grid, captions.lengths, captions.mask)
            text = text[:, : layout.text_tokens]
        return State(vision, text, temb, tuple(transformer.rope(x)), layout, (frames, height, width))

    def run_block(self, block: Callable[..., Any], state: State) -> State:
        mask: Any = state.layout
        if self.stock_attention:
            assert state.layout.key_mask is not None
            mask = state.layout.key_mask[:, None, None]
        return state.with_streams(*block(state.vision, state.text, state.temb, mask, state.rope))

    def finish(self, state: State) -> Tensor:
        transformer, (p_t, p_h, p_w) = self.transformer, self.patch
        out = transformer.proj_out(transformer.norm_out(state.vision, state.temb))
        out = out.unflatten(1, state.layout.grid).unflatten(-1, (-1, p_t, p_h, p_w))
        return out.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)

    def output_projection(self, layer: int) -> Tensor:
        block: Any = self.blocks[layer]
        if hasattr(block, "proj_mlp"):  # a single-stream block projects [attention | MLP] together
            heads = block.attn.heads
            width = block.attn.to_q.out_features
            return block.proj_out.weight[:, :width].detach().T.unflatten(0, (heads, -1))
        return super().output_projection(layer)
