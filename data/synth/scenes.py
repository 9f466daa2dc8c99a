"""Scenes of coloured shapes that move over backgrounds, some with a panning camera, and their captions.

Every scene depends only on (seed, index). Shapes and backgrounds are plain and smooth, so that a model can learn them
in minutes and a viewer can tell whether it did.
"""

from dataclasses import dataclass

import numpy as np

Vector = tuple[float, float]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 185, 60),
    "blue": (45, 85, 230),
    "yellow": (245, 220, 50),
    "orange": (250, 140, 25),
    "purple": (150, 55, 205),
    "cyan": (50, 210, 225),
    "white": (245, 245, 245),
}
#: Muted, so that every shape stands out: name -> (dark, light).
BACKGROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "gray": ((45, 45, 48), (178, 178, 182)),
    "blue": ((22, 32, 78), (160, 180, 222)),
    "green": ((20, 58, 36), (166, 208, 172)),
    "brown": ((70, 46, 28), (208, 182, 152)),
}
SHAPES = ("circle", "square", "triangle", "star")
PATTERNS = ("plain", "gradient", "striped", "checkered")
#: Name in the caption -> direction on the screen (x right, y down).
DIRECTIONS: dict[str, Vector] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and left": (-0.75, -0.75),
    "up and right": (0.75, -0.75),
    "down and left": (-0.75, 0.75),
    "down and right": (0.75, 0.75),
}
PANS = ("left", "right", "up", "down")

#: Every word that captions use.
CAPTION_WORDS: tuple[str, ...] = tuple(
    sorted(
        {
            "a",
            "an",
            "the",
            "over",
            "moves",
            "grows",
            "shrinks",
            "stands",
            "still",
            "background",
            "camera",
            "pans",
            "dark",
        }
        | {"light", "and", "left", "right", "up", "down", *COLOURS, *BACKGROUNDS, *SHAPES, *PATTERNS[1:]}
    )
)

# In 64ths of the frame's side.
_TRAVEL, _PAN = 28.0, 12.0
# Distance of the farthest corner of any shape from its centre, in radii.
_REACH = 1.4


@dataclass(frozen=True)
class Actor:
    """A shape: its look, the middle of its path, and its action."""

    shape: str
    colour: str
    radius: float
    middle: Vector
    action: str  # "moves left", "grows", ...
    travel: Vector  # in world coordinates, start to end
    growth: float  # radius at the end over radius at the start


@dataclass(frozen=True)
class Scene:
    """A clip before it is drawn; lengths in 64ths of the frame's side."""

    actors: tuple[Actor, ...]
    hue: str
    tone: str
    pattern: str
    vertical: bool  # the background varies along x
    phase: float
    pan: str | None

    @property
    def caption(self) -> str:
        """A sentence that describes the scene."""
        acts = " and ".join(
            f"{_article(actor.colour)} {actor.colour} {actor.shape} {actor.action}" for actor in self.actors
        )
        pattern = "" if self.pattern == "plain" else f"{self.pattern} "
        pan = f", the camera pans {self.pan}" if self.pan else ""
        return f"{acts} over a {self.tone} {self.hue} {pattern}background{pan}"


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# -- choosing --------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, names: tuple[str, ...]) -> str:
    return names[int(rng.integers(len(names)))]


def _distance(colour: str, hue: str, tone: str) -> float:
    back = BACKGROUNDS[hue][tone == "light"]
    return float(np.linalg.norm(np.subtract(COLOURS[colour], back)))


def _action(rng: np.random.Generator) -> tuple[str, Vector, float]:
    kind = rng.random()
    if kind < 0.1:
        return "stands still", (0.0, 0.0), 1.0
    if kind < 0.2:
        return "grows", (0.0, 0.0), 2.0
    if kind < 0.3:
        return "shrinks", (0.0, 0.0), 0.5
    # Straight moves are chosen twice as often as diagonal ones: fewer cases to learn.
    direction = _pick(rng, PANS if kind < 0.77 else tuple(DIRECTIONS)[4:])
    x, y = DIRECTIONS[direction]
    return f"moves {direction}", (x * _TRAVEL, y * _TRAVEL), 1.0


def _middle(rng: np.random.Generator, radius: float, path: Vector, rows: Vector) -> Vector:
    """The middle of a path on the screen that keeps the shape inside the frame, if it fits."""
    low, high = rows
    slack_x = max(0.0, 32 - _REACH * radius - abs(path[0]) / 2)
    slack_y = max(0.0, (high - low) / 2 - _REACH * radius - abs(path[1]) / 2)
    return 32 + slack_x * rng.uniform(-1, 1), (low + high) / 2 + slack_y * rng.uniform(-1, 1)


def pan_shift(pan: str | None) -> Vector:
    """How far the world moves on the screen, (x, y): against the camera."""
    x, y = DIRECTIONS[pan] if pan else (0.0, 0.0)
    return -x * _PAN, -y * _PAN


def choose_scene(seed: int, index: int) -> Scene:
    """The scene of clip `index`."""
    rng = np.random.default_rng([seed, index])
    hue, tone, pattern = _pick(rng, tuple(BACKGROUNDS)), _pick(rng, ("dark", "light")), _pick(rng, PATTERNS)
    two = rng.random() < 0.05
    action, travel, growth = _action(rng)
    pan = None
    vertical = bool(rng.integers(2))
    if not two and pattern in ("striped", "checkered") and rng.random() < 0.35:
        pan = _pick(rng, PANS)
        along_x = bool(DIRECTIONS[pan][0])
        vertical = along_x  # the background must vary along the pan, or the pan cannot be seen
        if travel[0] and along_x or travel[1] and not along_x:
            pan = None  # a pan along the motion would hide or exaggerate it
    colours = [name for name in COLOURS if name != hue and _distance(name, hue, tone) > 130]
    first = colours[int(rng.integers(len(colours)))]
    phase = float(rng.random())
    if two:
        others = tuple(name for name in colours if name != first)
        actors = tuple(
            Actor(_pick(rng, SHAPES), colour, 11.0, _middle(rng, 11.0, path, rows), action_name, path, 1.0)
            for colour, rows, (action_name, path) in (
                (first, (2.0, 30.0), _sideways(rng)),
                (_pick(rng, others), (34.0, 62.0), _sideways(rng)),
            )
        )
        return Scene(actors, hue, tone, pattern, vertical, phase, None)
    radius = 11.0 if growth != 1 else float(rng.uniform(10, 15))
    shift = pan_shift(pan)
    on_screen = (travel[0] + shift[0], travel[1] + shift[1])
    largest = radius * max(np.sqrt(growth), 1 / np.sqrt(growth))
    actor = Actor(
        _pick(rng, SHAPES), first, radius, _middle(rng, largest, on_screen, (0.0, 64.0)), action, travel, growth
    )
    return Scene((actor,), hue, tone, pattern, vertical, phase, pan)


def _sideways(rng: np.random.Generator) -> tuple[str, Vector]:
    direction = _pick(rng, ("left", "right"))
    return f"moves {direction}", (DIRECTIONS[direction][0] * _TRAVEL, 0.0)
