"""What the folder of a base says of its encoders, whatever its family; no weight is read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from data.base_folder import read_class_config, weight_files
from data.families import COGVIDEOX, DEFAULT_FAMILY, MOCHI, VIDEO_FAMILIES, WAN, VideoFamily

#: Bytes at each end of a weight file that its fingerprint covers.
_HASHED_BYTES = 1 << 20


@dataclass(frozen=True)
class BaseFacts:
    """Facts of a base's encoders.

    Args:
        channels: of a latent.
        mean: per channel, of raw latents.
        std: standard deviation per channel, of raw latents.
        text_width: of a caption embedding.
        fingerprint: changes when an encoder is exchanged.
        family: of the base.
        text_tokens: of the longest caption.
        pooled_width: of a caption's pooled embedding; None for a family without one.
    """

    channels: int
    mean: list[float]
    std: list[float]
    text_width: int
    fingerprint: str
    family: VideoFamily = DEFAULT_FAMILY
    text_tokens: int = DEFAULT_FAMILY.text_tokens
    pooled_width: int | None = None

    def index_fields(self) -> dict[str, Any]:
        """What the index of latent shards says of the base. The default family is not named."""
        fields = {"channels": self.channels, "latents_mean": self.mean, "latents_std": self.std}
        fields |= {"text_width": self.text_width}
        if self.family is not DEFAULT_FAMILY:
            fields["family"] = self.family.name
        if self.pooled_width is not None:
            fields["pooled_width"] = self.pooled_width
        return fields


def base_family(base: Path) -> VideoFamily:
    """The family of a base, by the class of its VAE.

    Raises:
        ValueError: if the VAE is missing or of no known family, or the pipeline is another one with the same VAE.
    """
    by_vae = {family.vae: family for family in VIDEO_FAMILIES.values()}
    family = by_vae[_encoder_config(base, "vae", *by_vae)["_class_name"]]
    path = base / "model_index.json"
    if path.is_file():
        index = read_class_config(path, family.pipeline)
        # Wan 2.2 has the pipeline of Wan 2.1, with a second transformer or other timesteps.
        newer = index.get("boundary_ratio") is not None or index.get("expand_timesteps")
        if newer or (index.get("transformer_2") or [None])[0] is not None:
            raise ValueError(f"{path} describes Wan 2.2, which is not supported; expected a base of Wan 2.1.")
    return family


def read_base(base: Path) -> BaseFacts:
    """Reads the configs of the encoders, and looks for their weights.

    Args:
        base: diffusers pipeline folder; the transformer may be missing.

    Raises:
        ValueError: if a part of the base is missing, of another class or family, or pickled.
    """
    family = base_family(base)
    vae = _encoder_config(base, "vae", family.vae)
    texts = [_encoder_config(base, part, kind) for part, kind in family.text_encoders.items()]
    for tokenizer in family.tokenizers:
        if not (base / tokenizer / "tokenizer_config.json").is_file():
            raise ValueError(f"{base} lacks {tokenizer}/tokenizer_config.json; copy or download the base's tokenizer.")
    expected, ratios = (family.frame_stride, 8), _compression(family, vae)
    if ratios != expected:
        raise ValueError(f"{base}/vae compresses time and space by {ratios}, expected {family.title}'s {expected}.")
    mean, std = _normalisation(base, family, vae)
    text_tokens = _text_tokens(base, family)
    weight_files(base / "vae", "diffusion_pytorch_model")
    for part in family.text_encoders:
        weight_files(base / part, "model")
    text_width = texts[0]["d_model" if "d_model" in texts[0] else "hidden_size"]
    pooled_width = texts[1]["hidden_size"] if len(texts) > 1 else None
    fingerprint = _fingerprint(base, ("vae", *family.text_encoders, *family.tokenizers))
    return BaseFacts(len(mean), mean, std, text_width, fingerprint, family, text_tokens, pooled_width)


def vae_normalisation(base: Path) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation per channel of raw latents, by the VAE's config; None where a base has none.

    Raises:
        ValueError: if the VAE is of no known family, or its config lacks them.
    """
    if not (base / "vae" / "config.json").is_file():
        return None
    family = base_family(base)
    return _normalisation(base, family, _encoder_config(base, "vae", family.vae))


def _compression(family: VideoFamily, vae: dict[str, Any]) -> tuple[int, int]:
    """How many times fewer frames, and how many times smaller sides, the VAE's latents have."""
    if family is MOCHI:
        return prod(vae.get("temporal_expansions", (1, 2, 3))), prod(vae.get("spatial_expansions", (2, 2, 2)))
    if family is WAN:
        halves, patch = vae.get("temperal_downsample", (False, True, True)), vae.get("patch_size") or 1
        return 2 ** sum(map(bool, halves)), patch * 2 ** (len(vae.get("dim_mult", (1, 2, 4, 4))) - 1)
    time = int(vae.get("temporal_compression_ratio", 4))
    if family is COGVIDEOX:
        return time, 2 ** (len(vae.get("block_out_channels", (1, 1, 1, 1))) - 1)
    return time, vae.get("spatial_compression_ratio", 8)


def _normalisation(base: Path, family: VideoFamily, vae: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel of raw latents: the transformer sees (raw - mean) / std."""
    channels = vae.get("z_dim", 16) if family is WAN else vae.get("latent_channels", 12 if family is MOCHI else 16)
    path = base / "vae" / "config.json"
    if family in (MOCHI, WAN):
        lengths = {name: len(vae.get(name) or []) for name in ("latents_mean", "latents_std")}
        if set(lengths.values()) != {channels}:
            raise ValueError(f"{path} has {lengths} values for {channels} latent channels; copy or download it again.")
        return list(vae["latents_mean"]), list(vae["latents_std"])
    if vae.get("invert_scale_latents"):
        raise ValueError(f"{path} describes CogVideoX 1.5, which is not supported; expected CogVideoX 2B or 5B (1.0).")
    factor, shift = vae.get("scaling_factor"), vae.get("shift_factor")
    if not isinstance(factor, int | float) or not factor > 0 or shift:
        raise ValueError(
            f"{path} has scaling_factor {factor!r} and shift_factor {shift!r}, expected a number above 0 and no shift, "
            f"as {family.title} has; copy or download it again."
        )
    return [0.0] * channels, [1 / factor] * channels


def _text_tokens(base: Path, family: VideoFamily) -> int:
    """Tokens of the longest caption that the transformer takes; CogVideoX's config says how many that is."""
    path = base / "transformer" / "config.json"
    if family is not COGVIDEOX or not path.is_file():
        return family.text_tokens
    config = read_class_config(path, "CogVideoXTransformer3DModel")
    if config.get("patch_size_t") is not None:
        raise ValueError(f"{path} describes CogVideoX 1.5, which is not supported; expected CogVideoX 2B or 5B (1.0).")
    return config.get("max_text_seq_length", family.text_tokens)


def _encoder_config(base: Path, part: str, *expected: str) -> dict[str, Any]:
    path = base / part / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{base} lacks {part}/config.json; expected a diffusers pipeline folder with vae, text_encoder, tokenizer."
        )
    return read_class_config(path, *expected)


def _fingerprint(base: Path, parts: Sequence[str]) -> str:
    """A hash of every file of the encoders: its name, size and both ends (weights may be tens of gigabytes)."""
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted(p for p in (base / part).iterdir() if p.is_file() and not p.name.startswith(".")):
            size = path.stat().st_size
            digest.update(f"{part}/{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HASHED_BYTES))
                file.seek(max(0, size - _HASHED_BYTES))
                digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]
