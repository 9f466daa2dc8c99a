"""What encoding must know of a base before it loads a weight."""

import contextlib
import hashlib
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

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


def resolve_base(base: Path | str) -> Path:
    """The folder that a path or the id of a downloaded hub repository names.

    Raises:
        ValueError: if there is none; the message holds the command that downloads it.
    """
    path, name = Path(base), str(base)
    if path.is_dir():
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
    raise ValueError(f"base {name!r} is no folder; expected a diffusers pipeline folder or a hub id.")


def _check_weights(folder: Path, stem: str) -> None:
    """Weights are safetensors, in one file or in all that their index names; nothing is unpickled."""
    index = folder / f"{stem}.safetensors.index.json"
    names = [f"{stem}.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is damaged ({error!r}). Download or copy it again.") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if not missing:
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled and not index.is_file():
        raise ValueError(
            f"{folder} holds pickled weights only ({pickled[0]}), which can run code and are not read; expected "
            f"{names[0]}. Download the safetensors, or load and save the model again with safe_serialization=True."
        )
    raise ValueError(f"{folder} lacks {', '.join(missing)}; the base is incomplete. Download or copy it again.")


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
    """Reads the configs of the encoders, and looks for their weights.

    Args:
        base: diffusers pipeline folder; the transformer may be missing.

    Raises:
        ValueError: if a part of the base is missing, of another class, or pickled.
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
    _check_weights(base / "vae", "diffusion_pytorch_model")
    _check_weights(base / "text_encoder", "model")
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
