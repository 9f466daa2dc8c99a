"""Tiny transformers of every family, with random weights, and inputs that fit them."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    HunyuanVideoTransformer3DModel,
    MochiTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.pipelines.cogvideo.pipeline_cogvideox import CogVideoXPipeline
from torch import Tensor, nn

from trainer.models.captions import Captions
from trainer.models.families import FAMILIES
from trainer.models.split_model import SplitModel

#: Name -> the class and its config; names with a dash are variants of a family.
TINY: dict[str, tuple[Any, dict[str, Any]]] = {
    "mochi": (MochiTransformer3DModel, {
        "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 4, "in_channels": 4,
        "pooled_projection_dim": 8, "qk_norm": "rms_norm", "text_embed_dim": 16, "time_embed_dim": 16,
        "activation_fn": "swiglu", "max_sequence_length": 16,
    }),
    "wan": (WanTransformer3DModel, {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 4, "in_channels": 4,
        "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32, "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
    }),
    "hunyuan": (HunyuanVideoTransformer3DModel, {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "patch_size_t": 1, "guidance_embeds": True,
        "text_embed_dim": 16, "pooled_projection_dim": 8, "rope_axes_dim": (4, 6, 6),
    }),
    "cogvideox-5b": (CogVideoXTransformer3DModel, {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 16, "num_layers": 4, "sample_width": 6, "sample_height": 4, "sample_frames": 9,
        "max_text_seq_length": 5, "use_rotary_positional_embeddings": True,
    }),
    "cogvideox-2b": (CogVideoXTransformer3DModel, {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
        "text_embed_dim": 16, "num_layers": 4, "sample_width": 6, "sample_height": 4, "sample_frames": 9,
        "max_text_seq_length": 5,
    }),
}  # fmt: skip


def make(name: str, seed: int = 0, **config: Any) -> Any:
    """A transformer of a family, with every parameter away from its default."""
    kind, own = TINY[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(**{**own, **config})
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1 or parameter_name == "pos_frequencies":
                offset = 1.0 if "norm" in parameter_name and parameter_name.endswith("weight") else 0.0
                nn.init.normal_(parameter, offset, 0.2)
    return model.eval()


def inputs(
    model: Any, lengths: Sequence[int], *, grid: tuple[int, int, int] = (3, 4, 6), pad: int = 0, seed: int = 0
) -> dict[str, Any]:
    """Arguments of `SplitModel.forward` for captions of these lengths, padded by `pad` more than the longest.

    Captions of a family that has one length for all get that length.
    """
    generator = torch.Generator().manual_seed(seed)
    facts = FAMILIES[type(model).__name__].facts(model.config)
    if facts.text_tokens is not None:
        lengths, pad = [facts.text_tokens] * len(lengths), 0
    longest = max(lengths) + pad
    text = torch.randn(len(lengths), longest, facts.text_width, generator=generator)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    pooled = None if facts.pooled_width is None else torch.randn(len(lengths), facts.pooled_width, generator=generator)
    return {
        "x": torch.randn(len(lengths), facts.channels, *grid, generator=generator),
        "timestep": (1000.0 * torch.rand(len(lengths), generator=generator)).floor(),
        "captions": Captions(text * mask[..., None], mask, tuple(lengths), pooled),
    }


def stock_forward(split_model: SplitModel, x: Tensor, timestep: Tensor, captions: Captions) -> Tensor:
    """diffusers' own forward as the family's pipeline calls it, (B, C, F, H, W)."""
    model, text, text_mask = split_model.transformer, captions.text, captions.mask
    how: dict[str, Any] = {"timestep": timestep, "return_dict": False}
    if isinstance(model, MochiTransformer3DModel):
        return model(x, text, encoder_attention_mask=text_mask, **how)[0]
    if isinstance(model, WanTransformer3DModel):
        whole = nn.functional.pad(text, (0, 0, 0, 512 - text.shape[1]))
        return model(x, encoder_hidden_states=whole, **how)[0]
    if isinstance(model, HunyuanVideoTransformer3DModel):
        guidance = torch.full((len(x),), 6000.0)
        return model(
            x, encoder_hidden_states=text, encoder_attention_mask=text_mask, pooled_projections=captions.pooled,
            guidance=guidance, **how,
        )[0]  # fmt: skip
    rope = None
    if model.config.use_rotary_positional_embeddings:

        class Pipe:
            transformer, vae_scale_factor_spatial = model, 8

        rope = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            Pipe(),
            x.shape[3] * 8,
            x.shape[4] * 8,
            x.shape[2],
            x.device,  # type: ignore[arg-type]
        )
    return model(x.transpose(1, 2), encoder_hidden_states=text, image_rotary_emb=rope, **how)[0].transpose(1, 2)
