"""Draws layered scenes in batches, on any device: antialiased shapes from front to back over a patterned background.

Legend: B scenes, T frames, S side of the square frame in pixels. Lengths are 64ths of the frame's side.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.synth.layered import SHAPES, TEXTURES, LayeredObject, LayeredScene
from data.synth.scenes import BACKGROUNDS, COLOURS

#: Period of the background's stripes and pairs of checks, and of those of an object's texture.
_BACK_PERIOD, _TEXTURE_PERIOD = 22.0, 9.0


def _half_planes(x: Tensor, y: Tensor, corners: int, inner: float) -> Tensor:
    """Signed distance to a regular polygon, by its edges: exact along them, which is where antialiasing looks."""
    angles = [-math.pi / 2 + math.pi / corners + 2 * math.pi * k / corners for k in range(corners)]
    return torch.stack([x * math.cos(a) + y * math.sin(a) for a in angles]).amax(dim=0) - inner


def _box(x: Tensor, y: Tensor, width: float, height: float) -> Tensor:
    return torch.maximum(x.abs() - width, y.abs() - height)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: folded onto half of one, whose edge is a line."""
    radius = torch.hypot(x, y)
    sector = 2 * math.pi / 5
    angle = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    along, across = radius * angle.cos(), (radius * angle.sin()).abs()
    outer, inner = 1.35, 0.62
    bend_along, bend_across = inner * math.cos(sector / 2), inner * math.sin(sector / 2)
    normal = (bend_across, outer - bend_along)
    length = math.hypot(*normal)
    return ((along - outer) * normal[0] + across * normal[1]) / length


def _distance(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Signed distance (negative inside) to a shape of radius about one; areas are alike, but for ring and cross."""
    if shape == "circle":
        return torch.hypot(x, y) - 1.0
    if shape == "square":
        return _box(x, y, 0.86, 0.86)
    if shape == "triangle":
        return _half_planes(x, y, 3, 0.7)
    if shape == "star":
        return _star(x, y)
    if shape == "ring":
        return (torch.hypot(x, y) - 0.85).abs() - 0.27
    return torch.minimum(_box(x, y, 1.15, 0.4), _box(x, y, 0.4, 1.15))  # cross


def _wave(position: Tensor, period: float, phase: Tensor | float) -> Tensor:
    """A square wave from 0 to 1 with soft flanks."""
    return 0.5 + 0.5 * torch.tanh(2.5 * torch.sin(2 * math.pi * (position / period + phase)))


def _checks(x: Tensor, y: Tensor, period: float, phase: Tensor | float) -> Tensor:
    first, second = _wave(x, period, phase), _wave(y, period, phase)
    return first * (1 - second) + second * (1 - first)


def _texture(kind: str, x: Tensor, y: Tensor, phase: float) -> Tensor:
    """Share of the second colour at an object's own coordinates."""
    if kind == "plain":
        return torch.zeros_like(x)
    if kind == "striped":
        return _wave(y, _TEXTURE_PERIOD, phase)
    if kind == "checkered":
        return _checks(x, y, _TEXTURE_PERIOD, phase)
    dots = torch.sin(2 * math.pi * (x / _TEXTURE_PERIOD + phase)) * torch.sin(2 * math.pi * y / _TEXTURE_PERIOD)
    return torch.sigmoid(12 * (dots.abs() - 0.45))


def _background(scene: LayeredScene, x: Tensor, y: Tensor) -> Tensor:
    """(T, S, S, 3) colours at world coordinates."""
    base = torch.tensor(BACKGROUNDS[scene.hue][scene.tone == "light"], dtype=x.dtype, device=x.device)
    other = base * 0.62 if scene.tone == "light" else base + 0.32 * (255 - base)
    along = x if scene.vertical else y
    if scene.pattern == "plain":
        return base.expand(*x.shape, 3)
    if scene.pattern == "gradient":
        mix = 0.5 + 0.5 * torch.sin(2 * math.pi * ((along - 32) / 150 + scene.phase))
    elif scene.pattern == "striped":
        mix = _wave(along, _BACK_PERIOD, scene.phase)
    elif scene.pattern == "checkered":
        mix = _checks(x, y, _BACK_PERIOD, scene.phase)
    else:
        waves = (torch.sin(a * x + b * y + phase) for a, b, phase in scene.waves)
        mix = 0.5 + 0.5 * torch.tanh(functools.reduce(torch.add, waves))
    return torch.lerp(base, other, mix[..., None])


def _paint(picture: Tensor, item: LayeredObject, x: Tensor, y: Tensor, moment: Tensor, pixel: Tensor) -> Tensor:
    """The picture with one object on top; x, y are world coordinates (T, S, S), `pixel` (T, 1, 1) a pixel's side."""
    motion, turn = item.motion, 2 * math.pi * moment
    centre_x = item.middle[0] + motion.travel[0] * moment + motion.swing[0] * torch.sin(1.5 * turn)
    centre_y = item.middle[1] + motion.travel[1] * moment + motion.swing[1] * torch.sin(1.5 * turn)
    if motion.orbit:
        centre_x = centre_x + motion.orbit * torch.cos(turn + 2 * math.pi * item.phase)
        centre_y = centre_y + motion.orbit * torch.sin(turn + 2 * math.pi * item.phase)
    radius = item.radius * motion.growth**moment
    angle = item.angle + motion.spin * moment
    across, down = x - centre_x, y - centre_y
    own_x = (across * angle.cos() + down * angle.sin()) / radius
    own_y = (down * angle.cos() - across * angle.sin()) / radius
    cover = (0.5 - _distance(item.shape, own_x, own_y) * radius / pixel).clamp(0, 1)[..., None]
    colour = torch.tensor(COLOURS[item.colour], dtype=x.dtype, device=x.device)
    # Textures grow with their object, so that growing and a camera that comes nearer look alike only in the object.
    mix = _texture(item.texture, own_x * item.radius, own_y * item.radius, item.phase)[..., None]
    return torch.lerp(picture, torch.lerp(colour, colour * 0.4, mix), cover)


@torch.no_grad()
def render_layered(
    scenes: Sequence[LayeredScene], *, size: int, frames: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draws scenes, (B, T, S, S, 3) uint8 on `device`.

    Args:
        scenes: the B scenes.
        size: S.
        frames: T.
        device: where they are drawn; another device gives the same pictures to within one step of 255.

    Raises:
        ValueError: for a scene with an unknown shape or texture.
    """
    moment = torch.linspace(-0.5, 0.5, frames, device=device)[:, None, None]
    side = (torch.arange(size, device=device, dtype=torch.float32) + 0.5) * (64 / size)
    screen_y, screen_x = torch.meshgrid(side, side, indexing="ij")
    videos = []
    for scene in scenes:
        odd = [item for item in scene.objects if item.shape not in SHAPES or item.texture not in TEXTURES]
        if odd:
            raise ValueError(f"got {odd[0]}, expected a shape of {SHAPES} and a texture of {TEXTURES}.")
        pan, zoom = scene.camera_motion
        scale = zoom**moment
        x = (screen_x - 32) / scale + 32 + pan[0] * moment
        y = (screen_y - 32) / scale + 32 + pan[1] * moment
        picture = _background(scene, x, y)
        for item in reversed(scene.objects):
            picture = _paint(picture, item, x, y, moment, 64 / size / scale)
        videos.append(picture.round().to(torch.uint8))
    return torch.stack(videos)
