"""Looking up a base: its folder, its configs and its weight files, before a weight is loaded."""

import contextlib
import json
from pathlib import Path
from typing import Any

from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound


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
