"""The ways in which a caption is sampled, and what is said under each video."""

from collections.abc import Mapping
from typing import Any

BASE, BASE_MASKED, OTHER_SEED = "base", "base-masked", "base-other-seed"
RETRAINED, RETRAINED_MASKED = "retrained", "retrained-masked"
#: Variant -> its title.
TITLES = {
    BASE: "base",
    BASE_MASKED: "base, masked",
    OTHER_SEED: "base, another seed",
    RETRAINED: "retrained",
    RETRAINED_MASKED: "retrained, masked",
}


def sample_note(entry: Mapping[str, Any]) -> str:
    """Masked share, and similarity to the dense video or to the base's, as text, if they apply."""
    parts = []
    ratio = (entry.get("settings") or {}).get("mask_ratio")
    if ratio:
        parts.append(f"{100 * ratio:g} % of the weights removed at most")
    for reference, words in (("dense", "to the dense video"), ("base", "to the base's video")):
        if entry.get(f"psnr_to_{reference}") is not None:
            parts.append(f"PSNR {entry[f'psnr_to_{reference}']:.1f} dB")
        if entry.get(f"ssim_to_{reference}") is not None:
            parts.append(f"SSIM {entry[f'ssim_to_{reference}']:.3f} {words}")
    return ", ".join(parts)
