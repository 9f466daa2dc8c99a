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


def changing_frames(frames, size=32, start=0):
    """(T, H, W, 3): frames that all differ."""
    video = np.zeros((frames, size, size, 3), np.uint8)
    for t in range(frames):
        video[t, :, :, 0] = (start + 6 * t) % 250
        video[t, : size // 2, t % size :, 1] = 200
    return video
