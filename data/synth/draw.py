"""Renders scenes: antialiased shapes over smooth backgrounds.

Legend: T frames, S side of the square frame in pixels. Lengths are in 64ths of the frame's side.
"""

import numpy as np
from numpy.typing import NDArray

from data.synth.scenes import BACKGROUNDS, COLOURS, Scene, pan_shift

Array = NDArray[np.float64]

#: Width of a pair of stripes or of checks.
_PERIOD = 22.0


def _polygon(x: Array, y: Array, corners: Array) -> Array:
    """Signed distance (negative inside) of points to a simple polygon (K, 2)."""
    best = np.full(np.broadcast(x, y).shape, np.inf)
    inside = np.zeros(best.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        best = np.minimum(best, (px - ex * t) ** 2 + (py - ey * t) ** 2)
        crosses = (ay > y) != (by > y)
        inside ^= crosses & (x < ex * (y - ay) / (ey if ey else 1.0) + ax)
    return np.where(inside, -1, 1) * np.sqrt(best)


def _ring(count: int, radii: tuple[float, ...], turn: float) -> Array:
    angles = turn + 2 * np.pi * np.arange(count) / count
    lengths = np.resize(np.array(radii), count)
    return np.stack([np.cos(angles) * lengths, np.sin(angles) * lengths], axis=1)


_CORNERS = {  # of the unit shape; the areas are similar, so that no shape looks smaller
    "square": _ring(4, (1.22,), np.pi / 4),
    "triangle": _ring(3, (1.4,), -np.pi / 2),
    "star": _ring(10, (1.35, 0.62), -np.pi / 2),
}


def _coverage(shape: str, x: Array, y: Array, radius: float, pixel: float) -> Array:
    """Share of each pixel that the shape covers: the signed distance, clipped over the width of a pixel."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    else:
        distance = _polygon(x, y, _CORNERS[shape] * radius)
    return np.clip(0.5 - distance / pixel, 0, 1)


def _wave(position: Array, phase: float) -> Array:
    """A square wave from 0 to 1 with smooth edges."""
    return 0.5 + 0.5 * np.tanh(2.5 * np.sin(2 * np.pi * (position / _PERIOD + phase)))


def _background(scene: Scene, x: Array, y: Array) -> Array:
    """(S, S, 3) colours at world coordinates."""
    base = np.array(BACKGROUNDS[scene.hue][scene.tone == "light"], dtype=float)
    other = base * 0.62 if scene.tone == "light" else base + 0.32 * (255 - base)
    along = x if scene.vertical else y
    if scene.pattern == "plain":
        mix = np.zeros_like(x)
    elif scene.pattern == "gradient":
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * (along - 32) / 150 + (np.pi if scene.phase > 0.5 else 0))
    elif scene.pattern == "striped":
        mix = _wave(along, scene.phase)
    else:
        first, second = _wave(x, scene.phase), _wave(y, scene.phase)
        mix = first * (1 - second) + second * (1 - first)
    return base + mix[..., None] * (other - base)


def render(scene: Scene, *, size: int = 64, frames: int = 19) -> NDArray[np.uint8]:
    """The frames of a scene, (T, S, S, 3) uint8 RGB."""
    pixel = 64 / size
    y, x = np.meshgrid((np.arange(size) + 0.5) * pixel, (np.arange(size) + 0.5) * pixel, indexing="ij")
    shift = pan_shift(scene.pan)
    video = np.empty((frames, size, size, 3), dtype=np.uint8)
    for number, moment in enumerate(np.linspace(-0.5, 0.5, frames) if frames > 1 else [0.0]):
        left, top = shift[0] * moment, shift[1] * moment  # position of the world's origin on the screen
        picture = _background(scene, x - left, y - top)
        for actor in scene.actors:
            centre_x = actor.middle[0] + actor.travel[0] * moment + left
            centre_y = actor.middle[1] + actor.travel[1] * moment + top
            radius = actor.radius * actor.growth**moment
            cover = _coverage(actor.shape, x - centre_x, y - centre_y, radius, pixel)[..., None]
            picture += cover * (np.array(COLOURS[actor.colour], dtype=float) - picture)
        video[number] = np.rint(picture)
    return video
