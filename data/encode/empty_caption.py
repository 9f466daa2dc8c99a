"""Adds the encoded empty caption to a folder of latent shards."""

from collections.abc import Callable
from typing import Any

from data.encode.encoders import TextEncoders
from data.shards.empty_caption import NAME, empty_caption_entry, has_empty_caption, write_empty_caption
from data.shards.folder import ShardFolder


def add_empty_caption(folder: ShardFolder, encoders: Callable[[], TextEncoders]) -> dict[str, Any]:
    """Encodes the empty caption unless the folder holds it; returns what the index says of it.

    Any number of processes may call it at once. One caption takes less time than to wait for another process's, so
    there is no lease: the first file stays.

    Args:
        folder: of the latent shards.
        encoders: gives the text encoders; called only where the file is missing.

    Raises:
        ValueError: if the encoders give numbers that are not finite.
        OSError: if the file cannot be written.
    """
    if not has_empty_caption(folder.folder, folder.hash):
        loaded = encoders()
        (text,), (pooled,) = loaded.text([""]), loaded.pooled([""])
        if not all(bool(part.isfinite().all()) for part in (text, pooled) if part is not None):
            raise ValueError(
                "the text encoder gave numbers that are not finite for the empty caption, expected finite ones; "
                "set text_dtype to bfloat16 or float32."
            )
        path = folder.folder / NAME
        # Of a process that wrote it meanwhile the file stays; a damaged one, or one of other settings, does not.
        if path.exists() and not has_empty_caption(folder.folder, folder.hash):
            path.unlink(missing_ok=True)
        write_empty_caption(folder.folder, folder.hash, text, pooled)
    return empty_caption_entry(folder.folder)
