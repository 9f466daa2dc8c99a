"""Contact sheets: a page that shows some samples.

Legend: C latent channels, F latent frames, H W latent grid, T video frames.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from data.files import atomic_file
from data.inspect.choose_samples import SampleLocation
from data.inspect.fonts import choose_fonts, replace_missing
from data.inspect.sample_clips import decode_some_frames, even_indices
from data.shards.format import read_json, read_member
from data.storage.store import Store
from data.video.worker_pool import Failure, WorkerPool

_FRAMES = 5


def draw_videos(chosen: Sequence[SampleLocation], store: Store, path: Path, pool: WorkerPool) -> None:
    """Draws frames of clips, each clip under its key and caption; in place of a clip that cannot be read, the reason.

    Args:
        chosen: the samples.
        store: reads them.
        path: PNG to write.
        pool: decodes the clips.

    Raises:
        ValueError: if there is no clip.
        OSError: if the sheet cannot be written.
    """
    if not chosen:
        raise ValueError("no clip for the contact sheet is known, since no record can be read; see --verify true.")
    tasks = [(shard, members, store) for shard, _, members in chosen]
    frames = partial(decode_some_frames, count=_FRAMES)
    strips = []
    for (_, key, _), result in zip(chosen, pool.map(frames, tasks), strict=True):
        if isinstance(result, Failure):
            result = result.reason, np.full((1, 36, 36 * _FRAMES, 3), 200, np.uint8)
        strips.append((_title(key, result[0]), result[1]))
    _draw(strips, path)


def draw_latents(chosen: Sequence[SampleLocation], store: Store, path: Path) -> None:
    """Draws latent frames, with their three principal components as red, green and blue.

    Args:
        chosen: the samples.
        store: reads them.
        path: PNG to write.

    Raises:
        ValueError: if none of them can be read.
        OSError: if the sheet cannot be written.
    """
    latents, titles = [], []
    for shard, key, members in chosen:
        try:
            mean = load_safetensors(read_member(shard, members["safetensors"], store))["mean"].astype(np.float64)
            caption = read_json(shard, members, store).get("caption", "")
        except (ValueError, KeyError, OSError, SafetensorError):
            continue  # the colours need its values; `verify` reports it
        latents.append(np.nan_to_num(mean[:, even_indices(mean.shape[1], _FRAMES)]))
        titles.append(_title(key, caption))
    if not latents:
        raise ValueError("none of the latents that were chosen for the contact sheet can be read; see --verify true.")
    pixels = np.concatenate([latent.reshape(len(latent), -1) for latent in latents], axis=1)
    centre = pixels.mean(axis=1, keepdims=True)
    directions = np.linalg.svd(np.cov(pixels))[0][:, :3].T  # (3, C)
    low, high = np.quantile(directions @ (pixels - centre), [0.02, 0.98], axis=1)
    strips = []
    for title, latent in zip(titles, latents, strict=True):
        colours = np.einsum("kc,cfhw->fhwk", directions, latent - centre[..., None, None])
        scaled = (colours - low) / np.maximum(high - low, 1e-9)
        strips.append((title, (255 * scaled.clip(0, 1)).astype(np.uint8)))
    _draw(strips, path)


def _title(key: str, caption: str) -> str:
    return " ".join(f"{key}: {caption}"[:220].split())[:110]


def _draw(strips: Sequence[tuple[str, NDArray[np.uint8]]], path: Path) -> None:
    """Draws (title, frames (T, H, W, 3)) pairs in two columns."""
    rows = -(-len(strips) // 2)
    fonts = choose_fonts([title for title, _ in strips])
    figure = Figure(figsize=(14, 1.75 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, frames) in zip(axes, strips, strict=False):
        axis.imshow(np.concatenate(list(frames), axis=1), interpolation="nearest", aspect="equal")
        # Dollar signs do not enclose formulae here.
        axis.set_title(replace_missing(title, fonts), fontsize=7, loc="left", fontfamily=fonts, parse_math=False)
    save_contact_sheet(figure, path)


def save_contact_sheet(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, atomically.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    except OSError as error:
        raise OSError(error.errno, f"the contact sheet cannot be written: {error.strerror}", str(path)) from error
