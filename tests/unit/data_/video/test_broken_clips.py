"""Real files of every kind in `tests.support.broken_clips`: sound ones are read to the pixel, broken ones are named.

FFmpeg's own frames, decoded one after another, are the reference for decord and for seeking.
"""

import av
import numpy as np
import pytest

from data.video.decode import decode_video
from data.video.probe import probe_times, probe_video
from tests.support import broken_clips

#: How numpy turns the stored pictures of a kind upright.
UPRIGHT = {
    "rotated-90": lambda video: np.rot90(video, -1, axes=(1, 2)),
    "rotated-180": lambda video: np.rot90(video, 2, axes=(1, 2)),
    "rotated-270": lambda video: np.rot90(video, 1, axes=(1, 2)),
    "mirrored": lambda video: video[:, :, ::-1],
}


def truth(name, path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    width = {"width": 128} if name == "anamorphic" else {}
    stored = np.stack([frame.to_ndarray(format="rgb24", **width) for frame in frames])
    times = np.array([frame.time for frame in frames])
    return UPRIGHT.get(name, lambda video: video)(stored), times - times[0]


@pytest.mark.parametrize("name", broken_clips.SOUND)
def test_a_sound_clip_is_described_as_it_is(clip_of_kind, name):
    kind, path = broken_clips.SOUND[name], clip_of_kind(name)
    info = probe_video(path)
    assert (info.frames, info.height, info.width) == (kind.frames, kind.height, kind.width)
    assert (info.codec, info.rotation, info.variable) == (kind.codec, kind.rotation, kind.variable)
    if not kind.variable:
        assert info.fps == pytest.approx(broken_clips.FPS)
        assert info.duration == pytest.approx(kind.frames / broken_clips.FPS, abs=0.1)
    assert probe_video(path.read_bytes()) == info


@pytest.mark.parametrize("name", broken_clips.SOUND)
def test_every_frame_is_the_requested_one(clip_of_kind, name):
    path = clip_of_kind(name)
    expected, times = truth(name, path)
    assert np.allclose(probe_times(path)[1], times, atol=1e-3)
    assert np.array_equal(decode_video(path), expected)
    assert np.array_equal(decode_video(path.read_bytes(), 1), expected[:1])
    n = len(expected)
    for indices in ([n - 1], range(0, n, 2), range(2 % n, n, 3), [n // 2, n // 3], [0, n - 1, 0], range(n // 2, n)):
        assert np.array_equal(decode_video(path, indices), expected[list(indices)]), list(indices)


def test_the_scene_is_upright_and_its_frames_follow_one_another(clip_of_kind):
    for name in ("h264", "rotated-90", "rotated-180", "rotated-270", "mirrored", "hevc-10-bit", "av1"):
        got = decode_video(clip_of_kind(name)).astype(int)
        scene = UPRIGHT.get(name, lambda video: video)(broken_clips.scene()).astype(int)
        assert np.abs(got - scene).mean() < 8, name
        for t in (3, 11):
            assert np.abs(scene - got[t]).mean(axis=(1, 2, 3)).argmin() == t


@pytest.mark.parametrize("name", broken_clips.BROKEN)
def test_a_broken_clip_is_refused_with_a_reason(clip_of_kind, name):
    path = clip_of_kind(name)
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=broken_clips.BROKEN[name].reason) as caught:
            probe_video(source)
        message = str(caught.value)
        assert len(message) < 250 and "\n" not in message and "/src/" not in message and "Errno" not in message
        with pytest.raises(ValueError, match=r"."):
            decode_video(source)


def test_the_complete_frames_of_a_truncated_clip_can_be_decoded(clip_of_kind):
    whole, cut = decode_video(clip_of_kind("fragmented")), clip_of_kind("promises-more")
    for _ in range(3):  # decord, which decodes ahead, would meet the damage in some runs only
        assert np.array_equal(decode_video(cut, 8), whole[:8])
    with pytest.raises(ValueError, match="has 8 frames, expected at least 9"):
        decode_video(cut, 9)
    with pytest.raises(ValueError, match="promises 20 frames, 8 can be read"):
        decode_video(cut)


def test_a_frame_that_cannot_be_decoded_is_an_error_and_not_its_neighbour(clip_of_kind):
    """decord would show another frame in its place."""
    content = bytearray(clip_of_kind("h264").read_bytes())
    with av.open(str(clip_of_kind("h264"))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
    content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_video(bytes(content))
    assert np.array_equal(decode_video(bytes(content), 8), decode_video(clip_of_kind("h264"), 8))
