"""What encoding must know of a base before it loads a weight."""

import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

_EDGE = 1 << 20


@dataclass(frozen=True)
class BaseFacts:
    """Facts of a base's encoders.

    Args:
        channels: of a latent.
        mean: per channel, of raw latents.
        std: per channel, of raw latents.
        text_width: of a caption embedding.
        fingerprint: changes when an encoder is exchanged.
    """

    channels: int
    mean: list[float]
    std: list[float]
    text_width: int
    fingerprint: str


def check_size(frames: int, height: int, width: int) -> None:
    """A size that Mochi's VAE and patches divide.

    Raises:
        ValueError: if frames are not 6 k + 1, or a side is no multiple of 16.
    """
    faults = []
    if frames < 1 or frames % 6 != 1:
        near = max(1, frames - (frames - 1) % 6)
        faults.append(f"got frames {frames}, expected 6 k + 1, for example {near} or {near + 6}")
    for name, side in (("height", height), ("width", width)):
        if side < 16 or side % 16:
            near = max(16, side - side % 16)
            faults.append(f"got {name} {side}, expected a multiple of 16, for example {near} or {near + 16}")
    if faults:
        raise ValueError("; ".join(faults) + ".")


def _config(base: Path, part: str, expected: str) -> dict[str, Any]:
    path = base / part / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{base} lacks {part}/config.json; expected a diffusers pipeline folder with vae, text_encoder, tokenizer."
        )
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download the base again.") from error
    named = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if named != expected:
        raise ValueError(f"{path} describes {named!r}, expected {expected!r}; point base at a Mochi pipeline folder.")
    return config


def read_base(base: Path) -> BaseFacts:
    """Reads the configs of the encoders.

    Raises:
        ValueError: if a part of the base is missing or of another class.
    """
    vae = _config(base, "vae", "AutoencoderKLMochi")
    text = _config(base, "text_encoder", "T5EncoderModel")
    if not (base / "tokenizer" / "tokenizer_config.json").is_file():
        raise ValueError(f"{base} lacks tokenizer/tokenizer_config.json; copy or download the base's tokenizer.")
    ratios = (prod(vae.get("temporal_expansions", (1, 2, 3))), prod(vae.get("spatial_expansions", (2, 2, 2))))
    if ratios != (6, 8):
        raise ValueError(f"{base}/vae compresses time and space by {ratios}, expected Mochi's (6, 8).")
    channels = vae.get("latent_channels", 12)
    lengths = {name: len(vae.get(name) or []) for name in ("latents_mean", "latents_std")}
    if set(lengths.values()) != {channels}:
        raise ValueError(f"{base}/vae/config.json has {lengths} values for {channels} latent channels; mend the base.")
    mean, std = list(vae["latents_mean"]), list(vae["latents_std"])
    return BaseFacts(channels, mean, std, text["d_model"], _fingerprint(base))


def _fingerprint(base: Path) -> str:
    """A hash of every file of the encoders: its name, size and both ends (weights may be tens of gigabytes)."""
    digest = hashlib.sha256()
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in sorted(p for p in (base / part).iterdir() if p.is_file() and not p.name.startswith(".")):
            size = path.stat().st_size
            digest.update(f"{part}/{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_EDGE))
                file.seek(max(0, size - _EDGE))
                digest.update(file.read(_EDGE))
    return digest.hexdigest()[:16]
