"""Whether a folder may be encoded into: what lies there already, and with which settings others are at it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.encode.claims import Claims
from data.shards.folder import ShardFolder, changes
from data.shards.format import LATENT_FORMAT
from data.storage.store import is_remote, local_path
from data.stream.shard_index import Source

#: Among the claims: what the process that came first encodes with.
SETTINGS = "settings.json"


def check_place(folder: ShardFolder, sources: Sequence[Source]) -> None:
    """Whether a folder is empty or holds latent shards of the same settings; nothing is written.

    Args:
        folder: of the latent shards.
        sources: the video shards.

    Raises:
        ValueError: if it holds anything else, the video shards for example.
    """
    out = folder.folder
    advice = f"expected a new folder, for example {out}-latents, or one of latents."
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; {advice}")
    if any(not is_remote(s.folder) and local_path(s.folder).resolve() == out.resolve() for s in sources):
        raise ValueError(f"{out} is the folder of the video shards themselves; {advice}")
    index = _read(out / "index.json")
    if index and index.get("format") != LATENT_FORMAT:
        raise ValueError(f"{out} holds other shards already (format {index.get('format')!r}); {advice}")
    known = {entry["name"].removesuffix(".tar") for source in sources for entry in source.index["shards"]}
    records = sorted((out / "records").glob("*.json"))
    # Those of our names are compared one by one, as the run comes to them: of these, one says of what kind all are.
    others = [path for path in records if path.stem not in known]
    for found in [index, *(_read(path) for path in [*records[:1], *others[:1]])]:
        there = (found or {}).get("settings")
        if isinstance(there, dict) and there.keys() != folder.settings.keys():
            raise ValueError(f"{out} holds other shards already, which `reblock encode` did not make; {advice}")
        if isinstance(there, dict) and there != folder.settings:
            what = changes(there, folder.settings)
            raise ValueError(
                f"{out} holds shards made with other settings: {what}. Choose another folder, or delete this one."
            )


def agree(folder: ShardFolder, claims: Claims) -> None:
    """Says for all processes with which settings the folder is encoded, or finds that another process said the same.

    Raises:
        ValueError: if it said something else.
        OSError: if the folder cannot be written.
    """
    text = claims.first_word(SETTINGS, json.dumps(folder.settings, indent=1) + "\n")
    try:
        there = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{claims.folder / SETTINGS} is damaged ({error}). Delete it if nobody encodes.") from error
    if there != folder.settings:
        raise ValueError(
            f"{folder.folder} is being encoded with other settings: {changes(there, folder.settings)}. Choose another "
            f"folder; if no process works on it any more, delete {claims.folder}."
        )


def _read(path: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is none: what is damaged is made again."""
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None
