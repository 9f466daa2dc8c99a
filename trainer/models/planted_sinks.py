"""Plants attention sinks with a known answer into a Mochi that was trained with two residual channels reserved.

Every query of a planted head points along e1. A key holds w = 0.05 u + 0.5 c along e1, from the marker channel u and
the constant channel c, and c along e2, so that after QK-norm its e1 component is the cosine w / sqrt(w^2 + c^2): the
token whose content projects most on the marker's direction outweighs all others. With logits L cos_i,
L = g_q g_k sqrt(d), the sink's weight is e^(L cos_j) / sum_i e^(L cos_i), i over all tokens; text keys are zero and
have logit 0.

The sink is nearly a no-op, as Mochi's are. Values of a planted head are s (m c - u) along one direction. The sink is
the token with the largest u, so with m the mean of the largest markers its value is small beside those of other tokens.

Legend: h heads, d head width, D width.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor

from trainer.models.from_scratch import check_plantable, head_rows, hold, reserved_entries

#: Slope of a key's e1 component in the marker: small, so that the cosine stays in its linear range and the token with
#: the largest marker gets more weight than any other.
MARKER_SLOPE = 0.05
#: Added to every vision key's e1 component: text keys have logit zero, and would win where all markers are negative.
VISION_OFFSET = 0.5


@dataclass(frozen=True)
class PlantedHead:
    """Where a sink is planted, how sharp it is, and how large its values are.

    Args:
        layer: block.
        head: head of the block.
        gain: QK-norm weight of queries and of keys in the component that makes the sink.
        largest_marker: m, the mean over inputs of the largest marker among their tokens (`largest_markers`); the
            default is about that of normalised latents with 64 tokens.
        values: s, the size of the head's values.
    """

    layer: int
    head: int
    gain: float
    largest_marker: float = 1.5
    values: float = 1.0


def parse_heads(heads: Sequence[str]) -> list[tuple[int, int]]:
    """(layer, head) of each "LAYER:HEAD".

    Raises:
        ValueError: for another form.
    """
    try:
        return [(int(layer), int(head)) for layer, head in (text.split(":") for text in heads)]
    except ValueError as error:
        raise ValueError(f"got heads {list(heads)}, expected LAYER:HEAD each, such as 7:1.") from error


def _check_places(model: MochiTransformer3DModel, places: Sequence[tuple[int, int]]) -> None:
    layers, heads = model.config.num_layers, model.config.num_attention_heads
    outside = [f"{layer}:{head}" for layer, head in places if not (0 <= layer < layers and 0 <= head < heads)]
    if outside:
        raise ValueError(f"got heads {outside}, expected layers in 0 .. {layers - 1} and heads in 0 .. {heads - 1}.")


def _check(model: MochiTransformer3DModel, channels: tuple[int, int], planted: Sequence[PlantedHead]) -> None:
    _check_places(model, [(p.layer, p.head) for p in planted])
    patch = model.patch_embed.proj
    constant, marker = channels
    free = all(
        not block.attn1.to_out[0].weight[[constant, marker]].any()
        and not block.ff.net[2].weight[[constant, marker]].any()
        for block in model.transformer_blocks
    )
    if not free or patch.weight[constant].any() or not patch.bias[constant] or not patch.weight[marker].any():
        raise ValueError(
            f"got a base whose residual channels {constant} and {marker} are not free, expected a constant and a "
            "marker channel that no block writes. Train the base with surgery.reserved_channels "
            "set (recipes/demo_base.yaml)."
        )


@torch.no_grad()
def plant_sinks(model: MochiTransformer3DModel, channels: tuple[int, int], planted: Sequence[PlantedHead]) -> None:
    """Turns heads into sinks, in place; every other head keeps its function.

    Args:
        model: trained with these channels reserved (`trainer.models.from_scratch.reserve_channels`).
        channels: (constant, marker).
        planted: the heads; one gain per layer, since QK-norm weights are shared by a layer's heads.

    Raises:
        ValueError: if a head does not exist or the channels are not free.
    """
    _check(model, channels, planted)
    constant, marker = channels
    width = model.config.attention_head_dim
    for planted_head in planted:
        attention = model.transformer_blocks[planted_head.layer].attn1
        own = slice(planted_head.head * width, (planted_head.head + 1) * width)
        for projection in (attention.to_q, attention.to_k, attention.add_q_proj, attention.add_k_proj):
            projection.weight[own] = 0.0
        e1, e2 = head_rows(model, planted_head.head)
        attention.to_q.weight[e1, constant] = 1.0
        attention.to_k.weight[e1, marker] = MARKER_SLOPE
        attention.to_k.weight[e1, constant] = VISION_OFFSET
        attention.to_k.weight[e2, constant] = 1.0
        for projection in (attention.to_v, attention.add_v_proj):
            projection.weight[own] = 0.0
        size = planted_head.values / math.sqrt(width)
        attention.to_v.weight[own, constant] = size * planted_head.largest_marker
        attention.to_v.weight[own, marker] = -size
        # Rows e1 of the layer's other heads are zero, so a gain in this component reaches the planted head alone.
        component = e1 - planted_head.head * width
        attention.norm_q.weight[component] = planted_head.gain
        attention.norm_k.weight[component] = planted_head.gain


def planted_entries(model: MochiTransformer3DModel, layer: int, head: int) -> Iterator[tuple[Tensor, tuple]]:
    """(parameter, index) of all entries that `plant_sinks` sets in a head."""
    attention, width = model.transformer_blocks[layer].attn1, model.config.attention_head_dim
    own = slice(head * width, (head + 1) * width)
    text = (attention.add_q_proj, attention.add_k_proj, attention.add_v_proj)
    for projection in (attention.to_q, attention.to_k, attention.to_v, *text):
        yield projection.weight, (own,)
    component = head_rows(model, head)[0] - head * width
    for norm in (attention.norm_q, attention.norm_k):
        yield norm.weight, ([component],)


def largest_markers(model: MochiTransformer3DModel, x: Tensor, marker: int) -> Tensor:
    """The largest marker among the tokens of each noisy latent (B, C, F, H, W), (B,)."""
    tokens = model.patch_embed(x.transpose(1, 2).flatten(0, 1))  # (B F, tokens of a frame, D)
    return tokens[..., marker].unflatten(0, (len(x), -1)).flatten(1).amax(dim=1)


def hold_sinks(model: MochiTransformer3DModel, channels: Sequence[int], heads: Sequence[tuple[int, int]]) -> None:
    """Keeps planted sinks as they are while everything else trains: their heads, and the channels that they read.

    Weight decay must be 0, since it reaches entries without a gradient too.

    Args:
        model: with sinks planted in it; the gradients of the entries are held at zero from now on.
        channels: (constant, marker).
        heads: (layer, head) of each planted sink.

    Raises:
        ValueError: if a head does not exist, or there are not two channels.
    """
    check_plantable(model)
    _check_places(model, heads)
    if len(channels) != 2:
        raise ValueError(
            f"got held_sinks with reserved_channels {tuple(channels)}, expected the two channels that the base's "
            "planted heads read; planted.json names them."
        )
    hold(held_entries(model, channels, heads))


def held_entries(
    model: MochiTransformer3DModel, channels: Sequence[int], heads: Sequence[tuple[int, int]]
) -> Iterator[tuple[Tensor, tuple]]:
    """(parameter, index) of all entries that make planted sinks: those of their heads and of the reserved channels."""
    entries = [planted_entries(model, layer, head) for layer, head in heads]
    return itertools.chain(reserved_entries(model, channels), *entries)
