"""What a transformer's config says, in the words of all families.

Legend: C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: Pixels of a latent cell's side, the same in the VAEs of all families.
VAE_STRIDE = 8


@dataclass(frozen=True)
class ModelFacts:
    """What a transformer's config says, in the words of all families.

    Args:
        family: its name in messages.
        num_blocks: transformer blocks.
        channels: C, channels of a latent.
        text_width: width of a caption embedding.
        patch: (t, h, w) latent cells of a token.
        empty_caption: what a sample trained without its caption has in its place: `nothing`, no tokens at all; `zeros`,
            as many tokens as ever; `encoded`, what the text encoder makes of an empty text.
        longest_caption: most tokens of a caption.
        text_tokens: tokens that every caption has, where padding takes part as other tokens do; None where it does not.
        pooled_width: width of a caption's pooled embedding, a second input; None for a family without one.
    """

    family: str
    num_blocks: int
    channels: int
    text_width: int
    patch: tuple[int, int, int]
    empty_caption: Literal["nothing", "zeros", "encoded"]
    longest_caption: int
    text_tokens: int | None = None
    pooled_width: int | None = None

    def check_latent(self, frames: int, height: int, width: int) -> None:
        """Checks that patches divide a latent.

        Raises:
            ValueError: if they do not.
        """
        if any(size % patch for size, patch in zip((frames, height, width), self.patch, strict=True)):
            raise ValueError(
                f"got a latent of {frames} x {height} x {width}, expected multiples of "
                f"{' x '.join(map(str, self.patch))}: use frames whose height and width are multiples of "
                f"{VAE_STRIDE * self.patch[1]} and {VAE_STRIDE * self.patch[2]} pixels."
            )


def check_text_to_video(config: Mapping[str, Any], family: str) -> None:
    """Checks that a model takes as many channels as it predicts; one that takes an image has more.

    Raises:
        ValueError: if it does not.
    """
    if config["out_channels"] not in (None, config["in_channels"]):
        raise ValueError(
            f"got in_channels {config['in_channels']} and out_channels {config['out_channels']}, expected them equal: "
            f"a {family} of text to video."
        )
