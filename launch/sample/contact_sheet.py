"""Draws the contact sheet of samples: one row per caption, one strip of frames per variant.

Legend: T frames, H W pixels.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from data.inspect.contact_sheet import save_contact_sheet
from data.inspect.fonts import choose_fonts, replace_missing
from data.inspect.sample_clips import even_indices
from launch.sample.variants import TITLES

_GAP = 2  # pixels between the frames of a strip
_ROW_GAP = 0.62  # inches between rows, for notes and the next caption


def frame_strip(video: NDArray[np.uint8], frames: int) -> NDArray[np.uint8]:
    """Places `frames` evenly spaced frames of a video (T, H, W, 3) side by side, with white gaps."""
    padded = np.pad(video[even_indices(len(video), frames)], ((0, 0), (0, 0), (0, _GAP), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)[:, :-_GAP]


def write_contact_sheet(
    path: Path,
    captions: Sequence[str],
    videos: Mapping[str, Sequence[NDArray[np.uint8]]],
    notes: Mapping[str, Sequence[str]],
    *,
    frames: int = 4,
) -> None:
    """Writes the contact sheet, atomically.

    Args:
        path: PNG file to write.
        captions: caption of each row.
        videos: videos of each variant, one (T, H, W, 3) per caption.
        notes: text below each video, likewise.
        frames: number of frames to show of each video.
    """
    first = frame_strip(next(iter(videos.values()))[0], frames)
    width = 4.4  # width of one strip in inches
    height = width * first.shape[0] / first.shape[1]
    size = (width * len(videos) + 0.2, (height + _ROW_GAP) * len(captions) + 0.6)
    figure = Figure(figsize=size, facecolor="white")
    axes = figure.subplots(len(captions), len(videos), squeeze=False)
    for column, (variant, own) in enumerate(videos.items()):
        for row, video in enumerate(own):
            ax = axes[row, column]
            ax.imshow(frame_strip(video, frames), interpolation="nearest", aspect="equal")
            ax.set_axis_off()
            ax.annotate(
                "\n".join(textwrap.wrap(notes[variant][row], 60)), (0.5, 0), (0, -3), xycoords="axes fraction",
                textcoords="offset points", ha="center", va="top", size=9, color="0.4",
            )  # fmt: skip
        title = TITLES.get(variant, variant)
        axes[0, column].annotate(
            title, (0.5, 1), (0, 20), xycoords="axes fraction", textcoords="offset points", ha="center", weight="bold"
        )
    fonts = choose_fonts(captions)
    for row, caption in enumerate(captions):
        text = "\n".join(textwrap.wrap(replace_missing(caption, fonts), 60 * len(videos)))
        axes[row, 0].annotate(
            text, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", size=10, color="0.25",
            fontfamily=fonts, parse_math=False,
        )  # fmt: skip
    figure.subplots_adjust(
        left=0.01,
        right=0.99,
        bottom=0.35 / figure.get_figheight(),
        top=1 - 0.55 / figure.get_figheight(),
        wspace=0.03,
        hspace=_ROW_GAP / height,
    )
    save_contact_sheet(figure, path)
