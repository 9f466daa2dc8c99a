"""The encoded empty caption of a folder of latent shards: a file of its own, named with its digest by the index.

Only families that are trained with it have one; `VideoFamily.encodes_empty` says which.

Legend: L text tokens, D text width.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from data.batch import EmptyCaption
from data.files import sha256, write_bytes_once
from data.storage.store import Store, join

#: Its file, beside the index.
NAME = "empty_caption.safetensors"
#: Field of the index: {"name", "bytes", "sha256"}.
FIELD = "empty_caption"
#: Key of the file's metadata: the hash of the settings that it was made with.
_SETTINGS = "settings"


def write_empty_caption(folder: Path, settings: str, text: Tensor, pooled: Tensor | None) -> None:
    """Writes the file unless it is there; of several processes the first one's stays.

    Args:
        folder: of the latent shards.
        settings: hash of the settings that the shards are made with.
        text: (L, D).
        pooled: (D_pooled,), for a family that takes one.
    """
    tensors = {"text": text.contiguous()} | ({} if pooled is None else {"pooled": pooled.contiguous()})
    write_bytes_once(folder / NAME, save(tensors, {_SETTINGS: settings}))


def has_empty_caption(folder: Path, settings: str) -> bool:
    """Whether a folder holds a whole file that was made with the settings of this hash."""
    try:
        with safe_open(folder / NAME, framework="pt") as file:
            return (file.metadata() or {}).get(_SETTINGS) == settings
    except (OSError, SafetensorError):
        return False


def empty_caption_entry(folder: Path) -> dict[str, Any]:
    """What the index says of the file."""
    path = folder / NAME
    return {"name": NAME, "bytes": path.stat().st_size, "sha256": sha256(path)}


def read_empty_caption(folder: str, index: Mapping[str, Any], store: Store) -> EmptyCaption:
    """The encoded empty caption of a folder of latent shards.

    Args:
        folder: path or URL.
        index: of the folder.
        store: that reads it.

    Raises:
        ValueError: if the folder has none, or its file is damaged or does not fit the index.
        OSError: if it cannot be read.
    """
    entry = index.get(FIELD)
    if entry is None:
        raise ValueError(
            f"{folder} holds no encoded empty caption. Run the `reblock encode` that made it once more: finished "
            "shards are kept, and only the missing file is added."
        )
    location = join(folder, entry["name"])
    mend = "Delete it and run `reblock encode` once more: finished shards are kept."
    try:
        content = store.read(location, 0, entry["bytes"], version=entry["sha256"])
    except FileNotFoundError as error:
        raise ValueError(
            f"{location} is absent, which the index names. Copy it, or run `reblock encode` once more."
        ) from error
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{location}: its checksum differs from the index. {mend}")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise ValueError(f"{location} is damaged ({error}). {mend}") from error
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    width, pooled = index["text_width"], index.get("pooled_width")
    expected = {"text": (max(1, *shapes.get("text", ())[:1]), width)} | (
        {} if pooled is None else {"pooled": (pooled,)}
    )
    if shapes != expected:
        raise ValueError(f"{location} holds {shapes}, expected {expected}. {mend}")
    found = {name: value.float() for name, value in tensors.items()}
    if not all(bool(value.isfinite().all()) for value in found.values()):
        raise ValueError(f"{location} holds numbers that are not finite; encode in bfloat16 or float32.")
    return EmptyCaption(found["text"], found.get("pooled"))
