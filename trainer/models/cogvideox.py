"""CogVideoX: one stream of [text | vision] with shared weights; v-prediction on 1,000 discrete noise levels.

Legend: B batch, F latent frames, H W latent grid, N vision tokens, L text tokens, D width, h heads, d head width.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.models.attention_processor import Attention, CogVideoXAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from trainer.models.captions import Captions
from trainer.models.facts import ModelFacts, check_text_to_video
from trainer.models.layout import TokenLayout
from trainer.models.process import DiscreteVelocity, Process
from trainer.models.split_model import ObservedAttention, SplitModel
from trainer.models.state import State


class OneStreamAttention(ObservedAttention):
    """Attention processor of one block; takes the place of diffusers' `CogVideoXAttnProcessor2_0`.

    Keys and queries are put into the order [vision | text], which the softmax does not see. `image_rotary_emb` is the
    rotary tables, or None, as diffusers' forward passes it; `SplitCogVideoX` passes the token layout behind them.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Any, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:
        vision, text = hidden_states.shape[1], encoder_hidden_states.shape[1]
        *rope, layout = image_rotary_emb or (None,)
        if not isinstance(layout, TokenLayout):
            rope = list(image_rotary_emb or ())
            layout = TokenLayout((1, 1, vision), (text,) * len(hidden_states), text, None)
        every = torch.cat([hidden_states, encoder_hidden_states], dim=1)
        q, k, v = (
            layer(every).unflatten(2, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if rope:
            q, k = (
                torch.cat([apply_rotary_emb(part[:, :, :vision], tuple(rope)), part[:, :, vision:]], dim=2)
                for part in (q, k)
            )
        out = self.attention(q, k, v, layout).transpose(1, 2).flatten(2, 3)
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, :vision], out[:, vision:]


#: By whether positions are rotary: 2B, without, was trained with another signal-to-noise ratio (docs/models.md).
_SHIFTS = {True: 1.0, False: 3.0}
_PROCESSES = {shift: DiscreteVelocity(shift) for shift in _SHIFTS.values()}
#: Fields of a scheduler's config that `DiscreteVelocity` stands for.
_SCHEDULE = {
    "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "trained_betas": None,
}  # fmt: skip


def _whole_schedule(scheduler: Mapping[str, Any]) -> Mapping[str, Any]:
    """A scheduler's config with the defaults of what it leaves out; both schedulers of CogVideoX have the same."""
    return CogVideoXDDIMScheduler().config | dict(scheduler)


class SplitCogVideoX(SplitModel):
    """A CogVideoX text-to-video transformer that can be run in parts: Args as of `SplitModel`."""

    family = "CogVideoX"
    transformer_class = CogVideoXTransformer3DModel
    processor_class = OneStreamAttention
    stock_processor_class = CogVideoXAttnProcessor2_0

    def __init__(
        self,
        transformer: CogVideoXTransformer3DModel,
        *,
        scheduler: Mapping[str, Any] | None = None,
        stock_attention: bool = False,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__(transformer, stock_attention=stock_attention, checkpoint_blocks=checkpoint_blocks)
        shift = _SHIFTS[transformer.config.use_rotary_positional_embeddings]
        if scheduler is not None:
            shift = _whole_schedule(scheduler)["snr_shift_scale"]
        self._process = _PROCESSES.get(shift) or DiscreteVelocity(shift)

    @property
    def process(self) -> Process:
        return self._process

    @staticmethod
    def check_scheduler(scheduler: Mapping[str, Any]) -> None:
        found = _whole_schedule(scheduler)
        odd = {name: repr(value) for name, value in _SCHEDULE.items() if found[name] != value}
        shift = found["snr_shift_scale"]
        if not isinstance(shift, int | float) or not shift > 0:
            odd["snr_shift_scale"] = "a number above 0"
        if odd:
            named = " and ".join(f"{name} {found[name]!r}, expected {value}" for name, value in odd.items())
            raise ValueError(
                f"got {named} in the scheduler's config of a {SplitCogVideoX.family}: of the published models' noise "
                "only snr_shift_scale may differ. Copy or download the base's scheduler again."
            )

    @staticmethod
    def facts(config: Mapping[str, Any]) -> ModelFacts:
        check_text_to_video(config, SplitCogVideoX.family)
        if config["patch_size_t"] is not None or config["ofs_embed_dim"] is not None:
            raise ValueError(
                f"got patch_size_t {config['patch_size_t']} and ofs_embed_dim {config['ofs_embed_dim']}, expected a "
                "CogVideoX 1.0 of text to video (2B or 5B), which has neither."
            )
        patch = config["patch_size"]
        return ModelFacts(
            SplitCogVideoX.family,
            config["num_layers"],
            config["in_channels"],
            config["text_embed_dim"],
            (1, patch, patch),
            empty_caption="zeros",
            longest_caption=config["max_text_seq_length"],
            text_tokens=config["max_text_seq_length"],
        )

    @staticmethod
    def blocks_of(transformer: CogVideoXTransformer3DModel) -> Sequence[nn.Module]:
        return transformer.transformer_blocks

    @staticmethod
    def output_parts(transformer: CogVideoXTransformer3DModel) -> Sequence[nn.Module | nn.Parameter]:
        return transformer.norm_final, transformer.norm_out, transformer.proj_out

    @staticmethod
    def starts_at_zero(block: nn.Module, name: str) -> bool:
        return name in ("norm1.linear", "norm2.linear")  # all gates of the block

    def changes_text(self, layer: int) -> bool:
        return layer < self.num_blocks - 1  # nothing reads what the last block makes of the text

    def embed(self, x: Tensor, timestep: Tensor, captions: Captions) -> State:
        self.check_sizes(x, captions)
        text = captions.text
        transformer, patch = self.transformer, self.transformer.config.patch_size
        _, _, frames, height, width = x.shape
        temb = transformer.time_embedding(transformer.time_proj(timestep).to(x.dtype))
        tokens = transformer.embedding_dropout(transformer.patch_embed(text, x.transpose(1, 2)))
        grid = (frames, height // patch, width // patch)
        return State(
            vision=tokens[:, text.shape[1] :],
            text=tokens[:, : text.shape[1]],
            temb=temb,
            rope=self._rope(grid, x.device),
            layout=TokenLayout(grid, captions.lengths, text.shape[1], None),
            size=(frames, height, width),
        )

    def _rope(self, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, ...]:
        """Rotary tables (N, d) as `CogVideoXPipeline` makes them; none for 2B."""
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return ()
        whole = config.sample_width // config.patch_size, config.sample_height // config.patch_size
        cos, sin = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=get_resize_crop_region_for_grid(grid[1:], *whole),
            grid_size=grid[1:],
            temporal_size=grid[0],
            device=device,
        )
        return cos, sin

    def run_block(self, block: Callable[..., Any], state: State) -> State:
        rope = (state.rope or None) if self.stock_attention else (*state.rope, state.layout)
        return state.with_streams(*block(state.vision, state.text, state.temb, rope))

    def finish(self, state: State) -> Tensor:
        transformer, patch = self.transformer, self.transformer.config.patch_size
        out = transformer.proj_out(transformer.norm_out(transformer.norm_final(state.vision), temb=state.temb))
        out = out.unflatten(1, state.layout.grid).unflatten(-1, (-1, patch, patch))  # (B, F, H', W', C, p, p)
        return out.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)
