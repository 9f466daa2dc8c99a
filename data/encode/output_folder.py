"""Whether a folder may be encoded into: which files it holds, and with which settings other processes encode."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.encode.leases import Leases
from data.shards.folder import ShardFolder, changes
from data.shards.format import LATENT_FORMAT
from data.storage.store import is_remote, local_path
from data.stream.shard_index import IndexedShards

#: File in the folder of the leases: the settings of the process that came first.
SETTINGS = "settings.json"


def check_output_folder(folder: ShardFolder, sources: Sequence[IndexedShards]) -> None:
    """Checks that a folder is empty or holds latent shards of the same settings; writes nothing.

    Args:
        folder: of the latent shards.
        sources: the video shards.

    Raises:
        ValueError: if it holds anything else, for example the video shards.
    """
    out = folder.folder
    advice = f"expected a new folder, for example {out}-latents, or one of latents."
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; {advice}")
    if any(not is_remote(s.folder) and local_path(s.folder).resolve() == out.resolve() for s in sources):
        raise ValueError(f"{out} is the folder of the video shards themselves; {advice}")
    index = _read_object(out / "index.json")
    if index and index.get("format") != LATENT_FORMAT:
        raise ValueError(f"{out} holds other shards already (format {index.get('format')!r}); {advice}")
    known = {entry["name"].removesuffix(".tar") for source in sources for entry in source.index["shards"]}
    records = sorted((out / "records").glob("*.json"))
    # The run compares the records of its own shards one by one. One record of other shards speaks for all of these.
    others = [path for path in records if path.stem not in known]
    for found in [index, *(_read_object(path) for path in [*records[:1], *others[:1]])]:
        settings = (found or {}).get("settings")
        if isinstance(settings, dict) and settings.keys() != folder.settings.keys():
            raise ValueError(f"{out} holds other shards already, which `reblock encode` did not make; {advice}")
        if isinstance(settings, dict) and settings != folder.settings:
            raise ValueError(
                f"{out} holds shards made with other settings: {changes(settings, folder.settings)}. Choose another "
                "folder, or delete this one."
            )


def register_settings(folder: ShardFolder, leases: Leases) -> None:
    """Writes the settings of this process for all others, or checks that the first process wrote the same ones.

    Raises:
        ValueError: if the first process wrote other settings.
        OSError: if the folder cannot be written.
    """
    text = leases.write_once(SETTINGS, json.dumps(folder.settings, indent=1) + "\n")
    try:
        settings = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{leases.folder / SETTINGS} is damaged ({error}). Delete it if nobody encodes.") from error
    if settings != folder.settings:
        raise ValueError(
            f"{folder.folder} is being encoded with other settings: {changes(settings, folder.settings)}. Choose "
            f"another folder; if no process works on it any more, delete {leases.folder}."
        )


def _read_object(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if it is absent or damaged, because a damaged file is written again."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None
