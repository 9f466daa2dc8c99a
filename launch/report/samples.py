"""Sampled videos, as pages embed them."""

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.report.results import RunResults

_VARIANTS = {"base": "base", "retrained": "retrained", "retrained-masked": "retrained, masked"}


def data_uri(path: Path, kind: str) -> str:
    """Encodes a file as a data URI of media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def sample_groups(results: RunResults) -> list[dict[str, Any]]:
    """Videos of a run, grouped by caption and seed; variants are in the order in which they were sampled."""
    groups: dict[tuple[str, int], list[dict[str, str]]] = {}
    for entry in results.samples:
        clip = {
            "uri": data_uri(results.run.samples / entry["file"], "video/mp4"),
            "variant": entry["variant"],
            "title": _VARIANTS.get(entry["variant"], entry["variant"]),
            "note": _sample_note(entry),
        }
        groups.setdefault((entry["caption"], entry["seed"]), []).append(clip)
    return [{"caption": caption, "seed": seed, "clips": clips} for (caption, seed), clips in groups.items()]


def _sample_note(entry: Mapping[str, Any]) -> str:
    """Masked share and similarity to the dense video as text, if they apply."""
    parts = []
    ratio = (entry.get("settings") or {}).get("mask_ratio")
    if ratio:
        parts.append(f"{100 * ratio:g} % of the weights removed")
    if entry.get("psnr_to_dense") is not None:
        parts.append(f"PSNR {entry['psnr_to_dense']:.1f} dB")
    if entry.get("ssim_to_dense") is not None:
        parts.append(f"SSIM {entry['ssim_to_dense']:.3f} to the dense video")
    return ", ".join(parts)
