"""Looking up a base: its folder, its configs and its weight files, before a weight is loaded."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

#: Bytes at each end of a weight file that its fingerprint covers.
_HASHED_BYTES = 1 << 20


def resolve_base(base: Path | str) -> Path:
    """The local path of a base.

    Args:
        base: a diffusers folder, a `config.json`, or the id of a hub repository that was downloaded.

    Raises:
        ValueError: if nothing is there; the message holds the command that downloads it.
    """
    path, name = Path(base), str(base)
    if path.exists():
        return path
    if name.count("/") == 1 and not name.startswith((".", "/")):
        with contextlib.suppress(CacheNotFound):
            found = [rev for repo in scan_cache_dir().repos if repo.repo_id == name for rev in repo.revisions]
            if found:
                return max(found, key=lambda rev: rev.last_modified).snapshot_path
        raise ValueError(
            f"base {name!r} is neither a local folder nor a downloaded hub id. Download it first: "
            f"`hf download {name}` (set HF_HOME to choose where), then run again."
        )
    raise ValueError(f"base {name!r} does not exist; expected a diffusers folder, a config.json or a hub id.")


def read_class_config(path: Path, *expected: str) -> dict[str, Any]:
    """The config of a part of a base, of one of the classes `expected`.

    Raises:
        ValueError: if the file is no JSON object, or describes another class.
    """
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy or download the base again.") from error
    got = config
    if isinstance(config, dict):
        got = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if got not in expected:
        raise ValueError(
            f"{path} describes {got!r}, expected {' or '.join(map(repr, expected))}. Point `base` at a diffusers "
            "pipeline folder of such a model."
        )
    return config


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The safetensors files of a part of a base: `STEM.safetensors`, or those that its index names.

    Raises:
        ValueError: if the index is damaged, a file is missing, or the weights are pickled.
    """
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}). Download or copy it again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if missing and pickled and not index.is_file():
        raise ValueError(
            f"{folder} holds pickled weights only ({pickled[0]}), which can run code and are not read; expected "
            f"{names[0]}. Download the safetensors, or load and save the model again with safe_serialization=True."
        )
    if missing:
        raise ValueError(f"{folder} lacks {', '.join(missing)}; the base is incomplete. Download or copy it again.")
    return [folder / name for name in names]


@dataclass(frozen=True)
class BaseFacts:
    """Facts of a base's encoders.

    Args:
        channels: of a latent.
        mean: per channel, of raw latents.
        std: standard deviation per channel, of raw latents.
        text_width: of a caption embedding.
        fingerprint: changes when an encoder is exchanged.
    """

    channels: int
    mean: list[float]
    std: list[float]
    text_width: int
    fingerprint: str


def read_base(base: Path) -> BaseFacts:
    """Reads the configs of the encoders, and looks for their weights.

    Args:
        base: diffusers pipeline folder; the transformer may be missing.

    Raises:
        ValueError: if a part of the base is missing, of another class, or pickled.
    """
    vae = _encoder_config(base, "vae", "AutoencoderKLMochi")
    text = _encoder_config(base, "text_encoder", "T5EncoderModel")
    if not (base / "tokenizer" / "tokenizer_config.json").is_file():
        raise ValueError(f"{base} lacks tokenizer/tokenizer_config.json; copy or download the base's tokenizer.")
    ratios = (prod(vae.get("temporal_expansions", (1, 2, 3))), prod(vae.get("spatial_expansions", (2, 2, 2))))
    if ratios != (6, 8):
        raise ValueError(f"{base}/vae compresses time and space by {ratios}, expected Mochi's (6, 8).")
    channels = vae.get("latent_channels", 12)
    lengths = {name: len(vae.get(name) or []) for name in ("latents_mean", "latents_std")}
    if set(lengths.values()) != {channels}:
        raise ValueError(
            f"{base}/vae/config.json has {lengths} values for {channels} latent channels; copy or download it again."
        )
    weight_files(base / "vae", "diffusion_pytorch_model")
    weight_files(base / "text_encoder", "model")
    mean, std = list(vae["latents_mean"]), list(vae["latents_std"])
    return BaseFacts(channels, mean, std, text["d_model"], _fingerprint(base))


def _encoder_config(base: Path, part: str, expected: str) -> dict[str, Any]:
    path = base / part / "config.json"
    if not path.is_file():
        raise ValueError(
            f"{base} lacks {part}/config.json; expected a diffusers pipeline folder with vae, text_encoder, tokenizer."
        )
    return read_class_config(path, expected)


def _fingerprint(base: Path) -> str:
    """A hash of every file of the encoders: its name, size and both ends (weights may be tens of gigabytes)."""
    digest = hashlib.sha256()
    for part in ("vae", "text_encoder", "tokenizer"):
        for path in sorted(p for p in (base / part).iterdir() if p.is_file() and not p.name.startswith(".")):
            size = path.stat().st_size
            digest.update(f"{part}/{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_HASHED_BYTES))
                file.seek(max(0, size - _HASHED_BYTES))
                digest.update(file.read(_HASHED_BYTES))
    return digest.hexdigest()[:16]
