"""Scenes of two to four textured objects that hide one another, before a moving camera: chosen and captioned.

Richer than `scenes`: depth order, textures, rotation, swinging and circling, zoom. All that is discrete is in the
caption; places, phases and exact sizes are not. Every scene is a function of (seed, index) alone.
"""

import math
from dataclasses import dataclass

import numpy as np

from data.synth.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, PANS, Vector

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
TEXTURES = ("plain", "striped", "dotted", "checkered")
PATTERNS = ("plain", "gradient", "striped", "checkered", "cloudy")
SIZES: dict[str, Vector] = {"small": (6.5, 8.5), "large": (11.0, 15.0)}
CAMERAS = ("still", *(f"pans {way}" for way in PANS), "zooms in", "zooms out")
ACTIONS = (
    *(f"moves {way}" for way in DIRECTIONS), "stands still", "grows", "shrinks", "turns left", "turns right",
    "swings across", "swings along", "circles",
)  # fmt: skip

#: Every word a caption can hold, and "an", which none needs: without it the tokens of published runs would change.
LAYERED_CAPTION_WORDS: tuple[str, ...] = tuple(
    sorted(
        {"a", "an", "the", "in", "front", "of", "over", "background", "camera", "dark", "light"}
        | {*SHAPES, *TEXTURES[1:], *PATTERNS[1:], *SIZES, *COLOURS, *BACKGROUNDS}
        | {word for phrase in (*ACTIONS, *CAMERAS[1:]) for word in phrase.split()}
    )
)

# Lengths in 64ths of the frame's side.
_TRAVEL, _PAN, _SWING, _ORBIT, _ZOOM = 28.0, 20.0, 12.0, 9.0, 1.6
#: How far a colour must be from the background's, in 8-bit RGB.
_CONTRAST = 110.0


@dataclass(frozen=True)
class Motion:
    """Where an object is at moment t from -0.5 (start) to 0.5 (end); lengths in 64ths of the frame's side.

    Args:
        travel: straight way from start to end.
        swing: amplitude of one and a half sine periods.
        orbit: radius of one turn about the middle.
        growth: radius at the end over radius at the start.
        spin: turn from start to end in radians, clockwise on the screen.
    """

    travel: Vector = (0.0, 0.0)
    swing: Vector = (0.0, 0.0)
    orbit: float = 0.0
    growth: float = 1.0
    spin: float = 0.0


@dataclass(frozen=True)
class LayeredObject:
    """One object; the middle is that of its path."""

    shape: str
    texture: str
    size: str
    colour: str
    action: str
    radius: float
    middle: Vector
    angle: float
    phase: float

    @property
    def phrase(self) -> str:
        """The object in the caption."""
        texture = "" if self.texture == "plain" else f"{self.texture} "
        return f"a {self.size} {texture}{self.colour} {self.shape} {self.action}"

    @property
    def motion(self) -> Motion:
        """What its action does."""
        verb, _, way = self.action.partition(" ")
        if verb == "moves":
            x, y = DIRECTIONS[way]
            return Motion(travel=(x * _TRAVEL, y * _TRAVEL))
        return {
            "stands still": Motion(),
            "grows": Motion(growth=2.0),
            "shrinks": Motion(growth=0.5),
            "turns left": Motion(spin=-1.5 * math.pi),
            "turns right": Motion(spin=1.5 * math.pi),
            "swings across": Motion(swing=(_SWING, 0.0)),
            "swings along": Motion(swing=(0.0, _SWING)),
            "circles": Motion(orbit=_ORBIT),
        }[self.action]


@dataclass(frozen=True)
class LayeredScene:
    """A clip before it is drawn.

    Args:
        objects: from front to back.
        hue: of the background.
        tone: `dark` or `light`.
        pattern: of the background.
        vertical: the background varies along x.
        phase: of its pattern, in periods.
        waves: (wave number along x and y, in radians per 64th of the side, and phase) of the cloudy pattern.
        camera: one of `CAMERAS`.
    """

    objects: tuple[LayeredObject, ...]
    hue: str
    tone: str
    pattern: str
    vertical: bool
    phase: float
    waves: tuple[tuple[float, float, float], ...]
    camera: str

    @property
    def caption(self) -> str:
        """What is seen, from front to back, in a sentence."""
        objects = " in front of ".join(item.phrase for item in self.objects)
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        camera = "" if self.camera == "still" else f", the camera {self.camera}"
        return f"{objects} over a {self.tone} {self.hue} {pattern}background{camera}"

    @property
    def camera_motion(self) -> tuple[Vector, float]:
        """(way of the camera over the world from start to end, magnification at the end over that at the start)."""
        verb, _, way = self.camera.partition(" ")
        if verb == "pans":
            x, y = DIRECTIONS[way]
            return (x * _PAN, y * _PAN), 1.0
        return (0.0, 0.0), {"still": 1.0, "zooms in": _ZOOM, "zooms out": 1 / _ZOOM}[self.camera]


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def choose_layered_scene(seed: int, index: int) -> LayeredScene:
    """The scene of clip `index`; it depends on nothing else."""
    rng = np.random.default_rng([seed, index, 0x6C6179])  # apart from the scenes of `scenes`
    hue, tone = _pick(rng, tuple(BACKGROUNDS)), _pick(rng, ("dark", "light"))
    back = BACKGROUNDS[hue][tone == "light"]
    apart = [name for name, rgb in COLOURS.items() if np.linalg.norm(np.subtract(rgb, back)) > _CONTRAST]
    count = int(rng.integers(2, 5))
    # No colour twice: the caption then says which object it speaks of.
    colours = rng.permutation([name for name in apart if name != hue])[:count]
    objects = []
    for colour in colours:
        size = _pick(rng, tuple(SIZES))
        objects.append(
            LayeredObject(
                shape=_pick(rng, SHAPES),
                texture=_pick(rng, TEXTURES),
                size=size,
                colour=str(colour),
                action=_pick(rng, ACTIONS),
                radius=float(rng.uniform(*SIZES[size])),
                middle=(float(rng.uniform(14, 50)), float(rng.uniform(14, 50))),
                angle=float(rng.uniform(-0.3, 0.3)),
                phase=float(rng.random()),
            )
        )
    waves = rng.normal(size=(4, 2)) * 0.12
    phases = rng.uniform(0, 2 * math.pi, size=4)
    return LayeredScene(
        objects=tuple(objects),
        hue=hue,
        tone=tone,
        pattern=_pick(rng, PATTERNS),
        vertical=bool(rng.integers(2)),
        phase=float(rng.random()),
        waves=tuple((float(x), float(y), float(p)) for (x, y), p in zip(waves, phases, strict=True)),
        camera=_pick(rng, CAMERAS),
    )
