"""Layered scenes show what their captions say, in its order of depth, and depend on (seed, index) alone."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from data.synth.layered import (
    ACTIONS,
    CAMERAS,
    LAYERED_CAPTION_WORDS,
    PATTERNS,
    SHAPES,
    TEXTURES,
    LayeredObject,
    LayeredScene,
    choose_layered_scene,
)
from data.synth.layered_draw import render_layered
from data.synth.scenes import COLOURS, DIRECTIONS

SCENES = [choose_layered_scene(0, index) for index in range(600)]
RED = LayeredObject("circle", "plain", "large", "red", "stands still", 12.0, (32.0, 32.0), 0.0, 0.0)
EMPTY = LayeredScene((), "gray", "dark", "plain", True, 0.0, ((0.1, 0.0, 0.0),), "still")


def draw(*objects: LayeredObject, frames: int = 5, size: int = 64, **changes) -> np.ndarray:
    scene = replace(EMPTY, objects=objects, **changes)
    return render_layered([scene], size=size, frames=frames)[0].numpy()


def mask(frame: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(frame.astype(int) - COLOURS[colour]).max(axis=-1) < 30


def centre(frame: np.ndarray, colour: str = "red") -> np.ndarray:
    y, x = np.nonzero(mask(frame, colour))
    return np.array([x.mean(), y.mean()])


def test_captions_use_the_vocabulary_and_all_of_it():
    used = Counter(word for scene in SCENES for word in scene.caption.replace(",", "").split())
    assert set(used) | {"an"} == set(LAYERED_CAPTION_WORDS)


def test_every_kind_of_scene_is_chosen():
    objects = [item for scene in SCENES for item in scene.objects]
    assert {item.shape for item in objects} == set(SHAPES)
    assert {item.texture for item in objects} == set(TEXTURES)
    assert {item.action for item in objects} == set(ACTIONS)
    assert {scene.pattern for scene in SCENES} == set(PATTERNS)
    assert {scene.camera for scene in SCENES} == set(CAMERAS)
    assert Counter(len(scene.objects) for scene in SCENES).keys() == {2, 3, 4}
    assert all(len({item.colour for item in scene.objects}) == len(scene.objects) for scene in SCENES)


def test_scenes_depend_on_seed_and_index_alone():
    assert choose_layered_scene(0, 3) == SCENES[3] != SCENES[4]
    assert choose_layered_scene(1, 3) != SCENES[3]


def test_a_batch_draws_each_scene_as_if_alone():
    together = render_layered(SCENES[:3], size=32, frames=3)
    assert together.shape == (3, 3, 32, 32, 3) and together.dtype == torch.uint8
    for number, scene in enumerate(SCENES[:3]):
        assert torch.equal(together[number], render_layered([scene], size=32, frames=3)[0])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_objects_move_as_the_caption_says(direction):
    video = draw(replace(RED, action=f"moves {direction}"))
    way, said = centre(video[-1]) - centre(video[0]), np.array(DIRECTIONS[direction])
    np.testing.assert_allclose(way, 28 * said, atol=0.3)


@pytest.mark.parametrize("action, least, most", [("grows", 3.7, 4.3), ("shrinks", 0.23, 0.27), ("stands still", 1, 1)])
def test_objects_change_size_as_the_caption_says(action, least, most):
    video = draw(replace(RED, action=action), size=128)
    first, last = (mask(frame, "red").sum() for frame in (video[0], video[-1]))
    assert least <= last / first <= most


def test_objects_swing_circle_and_turn():
    across = np.array([centre(frame) for frame in draw(replace(RED, action="swings across"), frames=43)])
    assert np.ptp(across[:, 0]) == pytest.approx(24, abs=0.5) and np.ptp(across[:, 1]) < 0.1
    along = np.array([centre(frame) for frame in draw(replace(RED, action="swings along"), frames=43)])
    assert np.ptp(along[:, 1]) == pytest.approx(24, abs=0.5) and np.ptp(along[:, 0]) < 0.1
    # Finer pixels: the middle of a mask is as exact as they are.
    round_ = np.array([centre(frame) for frame in draw(replace(RED, action="circles"), frames=43, size=256)])
    radius = np.linalg.norm(round_ - (127.5, 127.5), axis=1) / 4
    np.testing.assert_allclose(radius, 9, atol=0.1)
    triangle = replace(RED, shape="triangle")
    still, turned = draw(triangle)[2], draw(replace(triangle, action="turns right"))[4]
    assert (mask(still, "red") ^ mask(turned, "red")).sum() > 50
    # Three quarters of a turn to the right: half of them, from the middle to the end, by 135 degrees.
    straight = draw(replace(triangle, angle=0.75 * np.pi))[2]
    assert (mask(straight, "red") ^ mask(turned, "red")).sum() <= 4


def test_the_first_object_of_the_caption_hides_the_others():
    blue = replace(RED, colour="blue", shape="square")
    front, back = draw(RED, blue)[0], draw(blue, RED)[0]
    assert mask(front, "red").sum() == mask(draw(RED)[0], "red").sum() and mask(front, "blue").sum() > 0
    assert mask(back, "blue").sum() == mask(draw(blue)[0], "blue").sum()
    assert replace(EMPTY, objects=(RED, blue)).caption == (
        "a large red circle stands still in front of a large blue square stands still over a dark gray background"
    )


@pytest.mark.parametrize("way", ["left", "right", "up", "down"])
def test_a_pan_moves_the_world_against_the_camera(way):
    video = draw(RED, camera=f"pans {way}")
    np.testing.assert_allclose(centre(video[-1]) - centre(video[0]), -20 * np.array(DIRECTIONS[way]), atol=0.3)


@pytest.mark.parametrize("camera, factor", [("zooms in", 1.6), ("zooms out", 1 / 1.6)])
def test_a_zoom_changes_sizes_and_distances_about_the_middle(camera, factor):
    item = replace(RED, middle=(40.0, 32.0))
    video = draw(item, camera=camera, size=128)
    areas = [mask(frame, "red").sum() for frame in (video[0], video[-1])]
    assert areas[1] / areas[0] == pytest.approx(factor**2, rel=0.05)
    distances = [centre(frame)[0] - 63.5 for frame in (video[0], video[-1])]
    assert distances[1] / distances[0] == pytest.approx(factor, rel=0.03)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_as_large_as_their_formula_says(shape):
    area = (mask(draw(replace(RED, shape=shape), size=256)[0], "red").sum() / 16) / 144  # in squared radii
    star = 5 * 1.35 * 0.62 * np.sin(np.pi / 5)
    exact = {
        "circle": np.pi, "square": 1.72**2, "triangle": 3 * 3**0.5 * 0.49, "star": star,
        "ring": np.pi * (1.12**2 - 0.58**2), "cross": 2 * 2.3 * 0.8 - 0.8**2,
    }[shape]  # fmt: skip
    assert area == pytest.approx(exact, rel=0.04)


@pytest.mark.parametrize("texture", TEXTURES[1:])
def test_textures_show_two_tones(texture):
    frame = draw(replace(RED, texture=texture), size=128)[0].astype(int)
    dark = np.abs(frame - 0.4 * np.array(COLOURS["red"])).max(axis=-1) < 30
    light = mask(frame, "red")
    assert dark.sum() > 0.15 * light.sum() and light.sum() > 0.15 * dark.sum()


@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_backgrounds_vary(pattern):
    assert draw(pattern=pattern)[0].astype(int).std(axis=(0, 1)).max() > 8
    assert draw(pattern="plain")[0].astype(int).std(axis=(0, 1)).max() == 0


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="expected a shape of"):
        draw(replace(RED, shape="hexagon"))
