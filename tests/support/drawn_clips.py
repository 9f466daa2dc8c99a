"""Frames of clips whose content is known.

Legend: T frames, H W pixels.
"""

import numpy as np


def moving_bar(frames: int = 7, height: int = 48, width: int = 64) -> np.ndarray:
    """(T, H, W, 3): a bright bar that moves right by six pixels per frame."""
    video = np.full((frames, height, width, 3), (30, 60, 120), dtype=np.uint8)
    for t in range(frames):
        video[t, :, 4 + 6 * t : 16 + 6 * t] = (230, 200, 40)
    return video
