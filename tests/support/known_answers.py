"""Whole Mochi models with heads whose attention is known in advance, written into their weights by hand.

A few channels of both streams carry, from the embedding to the last block, what a test wrote into a token's latent
patch or caption embedding: a constant of one, and markers. A written head reads its queries, keys and values from them
alone. After QK-norm its logits are `strength` times the cosine of query and key, whatever the norms of the streams.

Legend: B batch, N tokens ([vision | text]), h heads, d head width, D stream width, M markers.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from diffusers import MochiTransformer3DModel
from hypothesis import Phase, settings
from torch import Tensor

from data.batch import Batch
from trainer.models.captions import Captions
from trainer.models.layout import AttentionCall, AttentionFunction, dense_attention
from trainer.models.mochi import SplitMochi

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def interpreted(*values):
    """Values of a test that runs Triton kernels, as an item of `parametrize`."""
    return pytest.param(
        *values, marks=pytest.mark.skipif(not _INTERPRETED, reason="set TRITON_INTERPRET=1 to interpret kernels")
    )


#: Back ends that a known answer must come out of; kernels are interpreted where the variable was set before the start.
BACKENDS = ["dense", "chunked", interpreted("triton")]
#: Drawn examples of a test: interpreted kernels take seconds for one, and are not made smaller when they fail.
DRAWN = (
    settings(max_examples=5, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
    if _INTERPRETED
    else settings(max_examples=60, deadline=None)
)

#: Channel of both streams that is one in every token. Marker m lies in channel 1 + m.
CONSTANT = 0
MARKERS = 5
#: What a written head reads: component of the head -> channel -> factor.
Reading = Mapping[int, Mapping[int, float]]
#: Beside it the epsilon of QK-norm, 1e-5, is nothing.
_LOUD = 1024.0


@torch.no_grad()
def free_channels(model: MochiTransformer3DModel) -> None:
    """Frees the channels: written by the embeddings only, not modulated, so that a written head reads what went in."""
    at = list(range(1 + MARKERS))
    for block in model.transformer_blocks:
        attention, last = block.attn1, block.attn1.context_pre_only
        # The first rows of a modulation scale what enters the attention.
        silent = [block.norm1.linear, block.norm1_context.linear_1 if last else block.norm1_context.linear]
        silent += [attention.to_out[0], block.ff.net[2]]
        silent += [] if last else [attention.to_add_out, block.ff_context.net[2]]
        for linear in silent:
            linear.weight[at] = 0.0
            if linear.bias is not None:
                linear.bias[at] = 0.0
    for embedding in (model.patch_embed.proj, model.time_embed.caption_proj):
        weight = embedding.weight.view(len(embedding.weight), -1)
        weight[at], embedding.bias[at] = 0.0, 0.0
        weight[at[1:], list(range(MARKERS))] = 1.0
        embedding.bias[CONSTANT] = 1.0


@torch.no_grad()
def write_head(
    model: MochiTransformer3DModel, place: tuple[int, int], query: Reading, key: Reading, *, strength: float,
    value: Reading | None = None,
) -> None:  # fmt: skip
    """Writes one head, for vision and text tokens alike.

    Args:
        model: its channels are free.
        place: (layer, head).
        query: what queries read. A token that reads nothing has logits of zero.
        key: what keys read.
        strength: logit of a query parallel to a key. The layer's other heads get the same, by their shared norms.
        value: what values read; None leaves them.
    """
    layer, head = place
    attention, width = model.transformer_blocks[layer].attn1, model.config.attention_head_dim
    own = slice(head * width, (head + 1) * width)
    for reading, pair in (
        (query, (attention.to_q, attention.add_q_proj)),
        (key, (attention.to_k, attention.add_k_proj)),
        (value, (attention.to_v, attention.add_v_proj)),
    ):
        if reading is None:
            continue
        loud = 1.0 if reading is value else _LOUD
        for projection in pair:
            projection.weight[own] = 0.0
            for component, channels in reading.items():
                for channel, factor in channels.items():
                    projection.weight[own][component, channel] = loud * factor
    for norm in (attention.norm_q, attention.norm_added_q):
        norm.weight.fill_(strength / math.sqrt(width))
    for norm in (attention.norm_k, attention.norm_added_k):
        norm.weight.fill_(1.0)
    # Pairs of components that are read turn with no position.
    model.pos_frequencies[:, head, sorted({component // 2 for component in (*query, *key)})] = 0.0


def coded_batch(
    make_batch: Callable[..., Batch], vision: Tensor, text: Tensor, grid: tuple[int, int, int], *, blank: bool = False,
    seed: int = 0,
) -> Batch:  # fmt: skip
    """A batch whose tokens carry markers, in otherwise random latents and captions.

    Args:
        make_batch: the fixture.
        vision: (B, F * H * W, M) of the vision tokens; fewer than `MARKERS` are filled up with zeros.
        text: (B, L, M), likewise.
        grid: (F, H, W) of the vision tokens.
        blank: everything but the markers is zero.
        seed: of the rest.
    """
    frames, height, width = grid
    batch = make_batch([text.shape[1]] * len(vision), grid=(frames, 2 * height, 2 * width), seed=seed)
    if blank:
        batch.latents.zero_()
    for marker in range(MARKERS):  # in the order of a patch's entries: channel, y, x
        pixels = batch.latents[:, marker // 4, :, marker // 2 % 2 :: 2, marker % 2 :: 2]
        pixels[:] = vision[..., marker].view(-1, *grid) if marker < vision.shape[-1] else 0.0
    batch.text[..., :MARKERS] = 0.0
    batch.text[:, : text.shape[1], : text.shape[-1]] = text  # a batch without captions is padded to one token
    return batch


def marked(tokens: int, places: Sequence[Sequence[int]], text: int = 0) -> tuple[Tensor, Tensor]:
    """Marker m, of one, at the tokens places[m], text tokens counted on from vision: (tokens, M) and (text, M)."""
    codes = torch.zeros(tokens + text, len(places))
    for marker, at in enumerate(places):
        codes[list(at), marker] = 1.0
    return codes[:tokens], codes[tokens:]


def attracted(marker: int, *, by: float = 1.0) -> dict[str, Reading]:
    """Query and key of a head in which every token attends to those with the marker, its query `by` parallel to them.

    Other keys are perpendicular to all queries, with logits of zero.
    """
    return {
        "query": {0: {CONSTANT: by}, 4: {CONSTANT: math.sqrt(1 - by * by)}},
        "key": {0: {1 + marker: 1.0}, 2: {CONSTANT: 1.0, 1 + marker: -1.0}},
    }


def sink_weight(strength: float, tokens: int, sinks: int = 1) -> float:
    """e^L / (n e^L + N - n): the weight on each of n keys of logit L among N, the others' logits zero."""
    return 1 / (sinks + (tokens - sinks) * math.exp(-strength))


@torch.no_grad()
def velocity(split_model: SplitMochi, batch: Batch, functions: Mapping[int, AttentionFunction] | None = None) -> Tensor:
    """The whole forward pass, (B, C, F, H, W); the layers named attend through their function."""
    with split_model.attention(functions or {}):
        time = torch.linspace(100.0, 900.0, len(batch))
        return split_model(batch.latents, time, Captions.of(batch))


def stock_velocity(model: MochiTransformer3DModel, batch: Batch) -> Tensor:
    """diffusers' own forward with its own attention processors, which stay in the model."""
    SplitMochi(model, stock_attention=True)
    time = torch.linspace(100.0, 900.0, len(batch))
    with torch.no_grad():
        return model(batch.latents, batch.text, time, batch.text_mask, return_dict=False)[0]


def watch(split_model: SplitMochi, batch: Batch, layer: int, measure: Callable[..., Any]) -> Any:
    """What measure(q, k, v, call) finds in one layer of the whole forward pass."""
    found = []

    def attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        found.append(measure(q, k, v, call))
        return dense_attention(q, k, v, call)

    assert velocity(split_model, batch, {layer: attend}).isfinite().all()
    return found[0]


def softmax64(q: Tensor, k: Tensor) -> Tensor:
    """A (B, h, N, N), float64, from the definition; apart from the engine's own reference."""
    scores = torch.einsum("bhid,bhjd->bhij", q.double(), k.double()) * q.shape[-1] ** -0.5
    weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return weights / weights.sum(dim=-1, keepdim=True)
