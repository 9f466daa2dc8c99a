"""Contact sheets: what some samples look like, on one page.

Legend: C latent channels, F latent frames, H W latent grid, T video frames.
"""

import unicodedata
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from data.files import atomic_file
from data.inspect.decode import evenly, some_frames
from data.shards.archive import Members
from data.shards.format import read_json, read_member
from data.storage.store import Store
from data.video.worker_pool import Failure, WorkerPool

_FRAMES = 5
#: Stands for a character that no font here has.
_BOX = "\N{WHITE SQUARE}"
#: Comes with matplotlib.
_USUAL = "DejaVu Sans"
Placed = tuple[str, str, Members]


def draw_videos(chosen: Sequence[Placed], store: Store, path: Path, pool: WorkerPool) -> None:
    """Strips of frames of clips, each under its key and caption; a clip that cannot be read shows why.

    Args:
        chosen: (shard, key, members).
        store: that reads them.
        path: PNG to write.
        pool: processes that decode.

    Raises:
        ValueError: if there is no clip.
        OSError: if it cannot be written.
    """
    if not chosen:
        raise ValueError("no clip for the contact sheet is known, since no record can be read; see --verify true.")
    tasks = [(shard, members, store) for shard, _, members in chosen]
    frames = partial(some_frames, count=_FRAMES)
    strips = []
    for (_, key, _), found in zip(chosen, pool.map(frames, tasks), strict=True):
        if isinstance(found, Failure):
            found = found.reason, np.full((1, 36, 36 * _FRAMES, 3), 200, np.uint8)
        strips.append((_title(key, found[0]), found[1]))
    _draw(strips, path)


def draw_latents(chosen: Sequence[Placed], store: Store, path: Path) -> None:
    """Strips of latent frames, their three strongest directions as red, green and blue; arguments as `draw_videos`.

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
            continue  # without colours of its own it has no place on the sheet; `verify` names it
        latents.append(np.nan_to_num(mean[:, evenly(mean.shape[1], _FRAMES)]))
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


@lru_cache(16)
def _letters(family: str) -> frozenset[int]:
    """Characters that a font has; none if there is no such font, or it cannot be read."""
    try:
        return frozenset(get_font(findfont(FontProperties(family=family), fallback_to_default=False)).get_charmap())
    except (ValueError, RuntimeError, OSError):
        return frozenset()


def _choose_fonts(titles: Sequence[str]) -> list[str]:
    """The usual font, and of those installed here the few that have most of what it lacks."""
    lacking = {ord(character) for title in titles for character in title} - _letters(_USUAL)
    upright = {font.name for font in fontManager.ttflist if font.weight in (400, "normal") and font.style == "normal"}
    # "Last Resort" has a sign for every script and a letter of none.
    families = [name for name in sorted(upright - {_USUAL}) if not name.startswith("Last Resort")]
    helps = {name: lacking & _letters(name) for name in families} if lacking else {}
    chosen = [_USUAL]
    while best := max(helps, key=lambda name: len(helps[name]), default=None):
        if not (found := helps[best]):
            break
        chosen.append(best)
        helps = {name: letters - found for name, letters in helps.items()}
    return chosen


def _drawable(title: str, fonts: Sequence[str]) -> str:
    """A title with a box for each character that the fonts lack; signs that are not seen are left out."""

    def drawn(character: str) -> str:
        kind = unicodedata.category(character)
        if kind != "Cc" and any(ord(character) in _letters(font) for font in fonts):
            return character
        return "" if kind in ("Cf", "Mn") else _BOX

    return "".join(map(drawn, title))


def _draw(strips: Sequence[tuple[str, NDArray[np.uint8]]], path: Path) -> None:
    """Draws (title, (T, H, W, 3)) pairs in two columns."""
    rows = -(-len(strips) // 2)
    fonts = _choose_fonts([title for title, _ in strips])
    figure = Figure(figsize=(14, 1.75 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, frames) in zip(axes, strips, strict=False):
        axis.imshow(np.concatenate(list(frames), axis=1), interpolation="nearest", aspect="equal")
        # Dollar signs are no formulae here.
        axis.set_title(_drawable(title, fonts), fontsize=7, loc="left", fontfamily=fonts, parse_math=False)
    try:
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=110, format="png")
    except OSError as error:
        raise OSError(error.errno, f"the contact sheet cannot be written: {error.strerror}", str(path)) from error
