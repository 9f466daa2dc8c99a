"""Loading a base: a diffusers folder, a hub id, or a bare `config.json` with random weights."""

import json
from pathlib import Path

import torch
from diffusers import MochiTransformer3DModel
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from safetensors import SafetensorError, safe_open

_WEIGHTS = "diffusion_pytorch_model"


def _transformer_folder(base: Path) -> Path:
    """`base` itself if it is a transformer folder, else its `transformer` subfolder."""
    return base / "transformer" if (base / "transformer" / "config.json").is_file() else base


def _check_config(config: Path) -> dict:
    try:
        fields = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{config} is not JSON ({error}); expected a diffusers transformer config.") from error
    got = fields.get("_class_name")
    if got != "MochiTransformer3DModel":
        raise ValueError(
            f"{config} describes {got!r}, expected 'MochiTransformer3DModel'. "
            "Point `base` at a diffusers Mochi pipeline folder or its transformer subfolder."
        )
    return fields


def transformer_weight_files(base: str) -> list[Path]:
    """The safetensors files of a base's transformer, one or many."""
    folder = _transformer_folder(resolve_base(base))
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return [folder / f"{_WEIGHTS}.safetensors"]


def _check_weights(base: str) -> None:
    """Every shard is there and whole: safetensors headers are read, and their byte counts compared with the file's."""
    for path in transformer_weight_files(base):
        if not path.is_file():
            raise ValueError(f"{path.parent} lacks {path.name}; the base is incomplete. Download or copy it again.")
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or truncated ({error}). Download or copy it again.") from error


def _cached_snapshot(repo: str) -> Path | None:
    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        return None
    revisions = [rev for found in repos if found.repo_id == repo for rev in found.revisions]
    return max(revisions, key=lambda rev: rev.last_modified).snapshot_path if revisions else None


def resolve_base(base: str) -> Path:
    """The local folder or `config.json` that `base` names.

    Args:
        base: a diffusers pipeline folder, a transformer folder, a `config.json`, or a hub id that was downloaded.

    Raises:
        ValueError: if nothing is there; the message holds the command that downloads it.
    """
    path = Path(base)
    if path.exists():
        return path
    if base.count("/") == 1 and not base.startswith((".", "/")):
        snapshot = _cached_snapshot(base)
        if snapshot is not None:
            return snapshot
        raise ValueError(
            f"base {base!r} is neither a local folder nor a downloaded hub id. Download it first: "
            f"`hf download {base}` (set HF_HOME to choose where), then run again."
        )
    raise ValueError(f"base {base!r} does not exist; expected a diffusers folder, a config.json or a hub id.")


def read_config(base: str) -> dict:
    """The transformer's config of a base, checked to be Mochi's; no weight is read."""
    path = resolve_base(base)
    if path.is_file():
        return _check_config(path)
    config = _transformer_folder(path) / "config.json"
    if not config.is_file():
        raise ValueError(f"{path} holds no transformer/config.json and no config.json; expected a diffusers folder.")
    return _check_config(config)


def check_base(base: str) -> dict:
    """Like `read_config`, and the weight files are there and whole (headers only: seconds, whatever their size)."""
    fields = read_config(base)
    if resolve_base(base).is_dir():
        _check_weights(base)
    return fields


def load_transformer(
    base: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> MochiTransformer3DModel:
    """The transformer of a base.

    Args:
        base: what `resolve_base` takes. A `config.json` gives random weights, made on `device`.
        dtype: dtype of the weights.
        device: where they are made; "meta" makes shapes only.
        seed: for random weights.

    Raises:
        ValueError: if the base is missing, not Mochi, incomplete or truncated.
    """
    config = check_base(base)
    path = resolve_base(base)
    if path.is_file() or torch.device(device).type == "meta":
        with torch.device(device), torch.random.fork_rng(devices=_cuda_index(device)):
            torch.manual_seed(seed)
            previous = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                return MochiTransformer3DModel.from_config(config)
            finally:
                torch.set_default_dtype(previous)
    model = MochiTransformer3DModel.from_pretrained(
        _transformer_folder(path), torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )
    return model.to(device)


def _cuda_index(device: torch.device | str) -> list[int]:
    device = torch.device(device)
    return [device.index or 0] if device.type == "cuda" else []
