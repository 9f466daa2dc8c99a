"""A Mochi made from scratch rather than downloaded: its rotary frequencies, and residual channels kept free.

Legend: h heads, d head width, D width.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from diffusers import MochiTransformer3DModel
from torch import Tensor, nn

#: Rotary pairs of every head with frequency zero: their components depend on the content only, not on the position.
ZERO_PAIRS = (0, 1)
#: One token step along t, y and x in Mochi's positions, for a 4 x 4 grid: y and x span 192 whatever the grid.
_STEP = (1.0, 48.0, 48.0)


@torch.no_grad()
def draw_frequencies(model: MochiTransformer3DModel, seed: int) -> None:
    """Gives `pos_frequencies` (3, h, d / 2) random directions with log-spaced magnitudes, 0.2 to 2 radians a token.

    diffusers initialises them with zeros, so that a model would not know any position. `ZERO_PAIRS` stay zero.
    """
    _, heads, pairs = model.pos_frequencies.shape
    generator = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):  # Lightning calls this where new tensors go to the accelerator
        direction = torch.nn.functional.normalize(torch.randn(3, heads, pairs, generator=generator), dim=0)
        magnitude = 10 ** torch.linspace(math.log10(0.2), math.log10(2.0), pairs)
        values = direction * magnitude / torch.tensor(_STEP)[:, None, None]
        values[..., list(ZERO_PAIRS)] = 0.0
    model.pos_frequencies.copy_(values)


def head_rows(model: MochiTransformer3DModel, head: int) -> list[int]:
    """Rows of a query or key projection that hold `head`'s first component in each of the `ZERO_PAIRS`."""
    width = model.config.attention_head_dim
    return [head * width + 2 * pair for pair in ZERO_PAIRS]


def reserved_entries(model: MochiTransformer3DModel, channels: Sequence[int]) -> Iterator[tuple[Tensor, tuple]]:
    """(parameter, index) of all entries that write or read the channels, or feed the zero-frequency rotary pairs."""
    at = list(channels)
    every_row = [row for head in range(model.config.num_attention_heads) for row in head_rows(model, head)]
    for block in model.transformer_blocks:
        attention = block.attn1
        # The first D rows of the modulation scale the attention's input: without them a channel is read as it is.
        yield block.norm1.linear.weight, (at,)
        yield block.norm1.linear.bias, (at,)
        for projection in (attention.to_q, attention.to_k, attention.to_v, block.ff.net[0].proj):
            yield projection.weight, (slice(None), at)
        for projection in (attention.to_q, attention.to_k):
            yield projection.weight, (every_row,)
        yield attention.to_out[0].weight, (at,)
        yield attention.to_out[0].bias, (at,)
        yield block.ff.net[2].weight, (at,)
    yield model.proj_out.weight, (slice(None), at)
    yield model.patch_embed.proj.weight, (at,)
    yield model.patch_embed.proj.bias, (at,)


@torch.no_grad()
def reserve_channels(model: MochiTransformer3DModel, channels: Sequence[int], *, seed: int = 0) -> None:
    """Keeps two residual channels free while a base is trained, so that sinks can be planted in it later.

    The first channel is constant one in every token; the second, the marker, holds a fixed random direction of the
    latent patch. No layer writes or reads them (the sandwich norm leaves zeros zero), and the rows of the query and
    key projections that feed the zero-frequency rotary pairs stay zero.

    Args:
        model: the transformer; its entries are set, and their gradients held at zero from now on.
        channels: (constant, marker).
        seed: of the marker's direction.

    Raises:
        ValueError: if the channels are not two distinct ones of the model.
    """
    check_plantable(model)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    if len(set(channels)) != 2 or len(channels) != 2 or not all(0 <= c < width for c in channels):
        raise ValueError(
            f"got reserved_channels {tuple(channels)}, expected two distinct channels in 0 .. {width - 1}."
        )
    for parameter, mask in hold(reserved_entries(model, channels)).items():
        parameter.masked_fill_(mask, 0.0)
    constant, marker = channels
    patch = model.patch_embed.proj
    patch.bias[constant] = 1.0
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(patch.weight[marker].shape, generator=generator, device="cpu")
    patch.weight[marker] = (direction / direction.norm()).to(patch.weight.device)


def check_plantable(model: nn.Module) -> None:
    """Raises ValueError unless the model is a Mochi, whose layers this module knows."""
    if not isinstance(model, MochiTransformer3DModel):
        raise ValueError(
            f"got {type(model).__name__}, expected MochiTransformer3DModel for reserved_channels, held_sinks and "
            "`reblock plant`: sinks are planted in no other family."
        )


def hold(entries: Iterable[tuple[Tensor, tuple]]) -> dict[Tensor, Tensor]:
    """Holds the gradients of entries at zero. Returns which entries of each parameter these are."""
    masks: dict[Tensor, Tensor] = {}
    for parameter, index in entries:
        masks.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))[index] = True
    for parameter, mask in masks.items():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, mask=mask: grad.masked_fill(mask.to(grad.device), 0.0))
    return masks
