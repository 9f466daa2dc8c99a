"""Synthetic clips show what their captions say, and depend on (seed, index) alone."""

from collections import Counter

import numpy as np
import pytest

from data.synth.command import CAPTION_WORDS, synth
from data.synth.draw import render
from data.synth.scenes import BACKGROUNDS, COLOURS, DIRECTIONS, PATTERNS, SHAPES, choose_scene
from data.video.decode import decode_video

SCENES = [choose_scene(0, index) for index in range(600)]


def shape_mask(frame: np.ndarray, colour: str) -> np.ndarray:
    return np.abs(frame.astype(int) - COLOURS[colour]).max(axis=-1) < 30


def centre(mask: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(mask)
    return np.array([x.mean(), y.mean()])


def test_captions_use_the_vocabulary_and_all_of_it():
    used = Counter(word for scene in SCENES for word in scene.caption.replace(",", "").split())
    assert set(used) == set(CAPTION_WORDS)
    assert len(CAPTION_WORDS) < 60


def test_every_kind_of_scene_is_drawn_and_two_shapes_are_rare():
    assert {scene.pattern for scene in SCENES} == set(PATTERNS)
    assert {scene.hue for scene in SCENES} == set(BACKGROUNDS)
    assert {actor.shape for scene in SCENES for actor in scene.actors} == set(SHAPES)
    assert {scene.pan for scene in SCENES} == {None, "left", "right", "up", "down"}
    assert 0 < sum(len(scene.actors) > 1 for scene in SCENES) < 0.1 * len(SCENES)


def test_articles():
    assert any("an orange" in scene.caption for scene in SCENES)
    assert not any("a orange" in scene.caption for scene in SCENES)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shapes_move_as_the_caption_says(direction):
    said = [s for s in SCENES if len(s.actors) == 1 and f" moves {direction} over" in s.caption and not s.pan][:6]
    assert said
    for scene in said:
        video = render(scene, frames=5)
        way = centre(shape_mask(video[-1], scene.actors[0].colour)) - centre(
            shape_mask(video[0], scene.actors[0].colour)
        )
        assert np.dot(way / np.linalg.norm(way), DIRECTIONS[direction]) / np.linalg.norm(DIRECTIONS[direction]) > 0.99
        assert np.linalg.norm(way) > 20


@pytest.mark.parametrize("action, least, most", [("grows", 3.0, 5.0), ("shrinks", 0.2, 0.34), ("stands still", 1, 1)])
def test_shapes_change_size_as_the_caption_says(action, least, most):
    said = [s for s in SCENES if len(s.actors) == 1 and s.actors[0].action == action and not s.pan][:6]
    for scene in said:
        video = render(scene, frames=5)
        first, last = (shape_mask(frame, scene.actors[0].colour).sum() for frame in (video[0], video[-1]))
        assert least <= last / first <= most


@pytest.mark.parametrize("pan, axis, sign", [("left", 1, 1), ("right", 1, -1), ("up", 0, 1), ("down", 0, -1)])
def test_a_pan_moves_the_world_against_the_camera(pan, axis, sign):
    scene = next(s for s in SCENES if s.pan == pan)
    video = render(scene, frames=13).astype(int)  # the world moves one pixel per frame
    moved = np.roll(video[0], sign, axis=axis)
    strip = np.s_[2:4, :] if axis == 1 else np.s_[:, 2:4]  # at the edge, where no shape is
    inner = np.s_[:, 2:-2] if axis == 1 else np.s_[2:-2, :]
    assert np.abs(video[1][strip][inner] - moved[strip][inner]).max() <= 2
    assert np.abs(video[0][strip] - video[5][strip]).max() > 10  # and this can be seen


def test_clips_depend_on_seed_and_index_alone(tmp_path):
    synth(tmp_path / "few", clips=2, frames=3)
    synth(tmp_path / "more", clips=4, frames=3)
    for name in ("clip-000000", "clip-000001"):
        for suffix in (".mp4", ".txt"):
            assert (tmp_path / "few" / f"{name}{suffix}").read_bytes() == (
                tmp_path / "more" / f"{name}{suffix}"
            ).read_bytes()
    assert choose_scene(0, 1) != choose_scene(0, 2) != choose_scene(1, 2)
    caption = (tmp_path / "few" / "clip-000001.txt").read_text().strip()
    assert caption == choose_scene(0, 1).caption
    written = decode_video(tmp_path / "few" / "clip-000001.mp4")
    assert np.abs(written.astype(int) - render(choose_scene(0, 1), frames=3)).mean() < 4


def test_complete_clips_are_kept_and_incomplete_ones_made_again(tmp_path, capsys):
    synth(tmp_path, clips=3, frames=2)
    clip = tmp_path / "clip-000001.mp4"
    whole = clip.read_bytes()
    stamp = (tmp_path / "clip-000000.mp4").stat().st_mtime_ns
    (tmp_path / "clip-000001.txt").unlink()  # as if stopped before the caption was written
    clip.write_bytes(b"half")
    synth(tmp_path, clips=3, frames=2)
    assert "2 of 3 clips are there already" in capsys.readouterr().out
    assert clip.read_bytes() == whole
    assert (tmp_path / "clip-000000.mp4").stat().st_mtime_ns == stamp


def test_other_settings_and_impossible_ones_are_refused(tmp_path):
    synth(tmp_path, clips=1, frames=2)
    with pytest.raises(ValueError, match="choose another folder"):
        synth(tmp_path, clips=1, frames=2, seed=1)
    for wrong in ({"clips": 0}, {"size": 63}, {"frames": 0}, {"fps": 0}):
        with pytest.raises(ValueError, match="expected clips, frames and fps"):
            synth(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
