"""Real files of every kind that `tests.support.broken_clips` makes: what is sound is read to the
pixel, what is broken is named.

What FFmpeg itself decodes, one frame after another, is the truth that decord and seeking are measured by.
"""

import av
import numpy as np
import pytest

from data.video.clip_files import decode_video, frame_times, probe_video
from data.video.trim import clip_suffix, trim_video
from tests.support import broken_clips

#: How numpy turns the stored pictures of a kind upright.
UPRIGHT = {
    "rotated-90": lambda video: np.rot90(video, -1, axes=(1, 2)),
    "rotated-180": lambda video: np.rot90(video, 2, axes=(1, 2)),
    "rotated-270": lambda video: np.rot90(video, 1, axes=(1, 2)),
    "mirrored": lambda video: video[:, :, ::-1],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Paths by kind, made when they are asked for, once."""
    folder, paths = tmp_path_factory.mktemp("hostile"), {}
    return lambda name: (
        paths.setdefault(name, None) or paths.update({name: broken_clips.make(name, folder)}) or paths[name]
    )


def truth(name, path):
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    width = {"width": 128} if name == "anamorphic" else {}
    stored = np.stack([frame.to_ndarray(format="rgb24", **width) for frame in frames])
    times = np.array([frame.time for frame in frames])
    return UPRIGHT.get(name, lambda video: video)(stored), times - times[0]


@pytest.mark.parametrize("name", broken_clips.SOUND)
def test_a_sound_clip_is_described_as_it_is(made, name):
    kind, path = broken_clips.SOUND[name], made(name)
    info = probe_video(path)
    assert (info.frames, info.height, info.width) == (kind.frames, kind.height, kind.width)
    assert (info.codec, info.rotation, info.variable) == (kind.codec, kind.rotation, kind.variable)
    if not kind.variable:
        assert info.fps == pytest.approx(broken_clips.FPS)
        assert info.duration == pytest.approx(kind.frames / broken_clips.FPS, abs=0.1)
    assert probe_video(path.read_bytes()) == info


@pytest.mark.parametrize("name", broken_clips.SOUND)
def test_every_frame_is_the_one_that_was_asked_for(made, name):
    path = made(name)
    expected, times = truth(name, path)
    assert np.allclose(frame_times(path), times, atol=1e-3)
    assert np.array_equal(decode_video(path), expected)
    assert np.array_equal(decode_video(path.read_bytes(), 1), expected[:1])
    n = len(expected)
    for indices in ([n - 1], range(0, n, 2), range(2 % n, n, 3), [n // 2, n // 3], [0, n - 1, 0], range(n // 2, n)):
        assert np.array_equal(decode_video(path, indices), expected[list(indices)]), list(indices)


def test_the_scene_is_upright_and_its_frames_follow_one_another(made):
    for name in ("h264", "rotated-90", "rotated-180", "rotated-270", "mirrored", "hevc-10-bit", "av1"):
        got = decode_video(made(name)).astype(int)
        scene = UPRIGHT.get(name, lambda video: video)(broken_clips.scene()).astype(int)
        assert np.abs(got - scene).mean() < 8, name
        for t in (3, 11):
            assert np.abs(scene - got[t]).mean(axis=(1, 2, 3)).argmin() == t


@pytest.mark.parametrize("name", broken_clips.BROKEN)
def test_a_broken_clip_is_named_with_a_reason_in_words(made, name):
    path = made(name)
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match=broken_clips.BROKEN[name].reason) as caught:
            probe_video(source)
        message = str(caught.value)
        assert len(message) < 250 and "\n" not in message and "/src/" not in message and "Errno" not in message
        with pytest.raises(ValueError, match=r"."):
            decode_video(source)


def test_what_is_whole_of_a_cut_clip_can_be_decoded_and_no_more(made):
    whole, cut = decode_video(made("fragmented")), made("promises-more")
    for _ in range(3):  # decord, which decodes ahead, would meet the damage in some runs only
        assert np.array_equal(decode_video(cut, 8), whole[:8])
    with pytest.raises(ValueError, match="has 8 frames, expected at least 9"):
        decode_video(cut, 9)
    with pytest.raises(ValueError, match="promises 20 frames, 8 can be read"):
        decode_video(cut)


@pytest.mark.parametrize("window", [(0, 6), (9, 15), (17, 19), (14, 14)])
@pytest.mark.parametrize(
    "name", ["h264", "h264-b-frames", "h264-open-gop", "hevc", "hevc-10-bit", "vp9", "av1", "transport-stream",
             "fragmented", "variable-rate", "rotated-90", "anamorphic", "matroska"]
)  # fmt: skip
def test_a_trimmed_clip_holds_the_same_frames_at_the_same_times(made, name, window):
    (first, last), path = window, made(name)
    content, index = trim_video(path, first, last)
    wanted = range(index, index + last - first + 1)
    assert np.array_equal(decode_video(content, wanted), decode_video(path, range(first, last + 1)))
    new, old = frame_times(content)[list(wanted)], frame_times(path)[first : last + 1]
    assert np.allclose(new - new[0], old - old[0], atol=1.1e-3)
    assert probe_video(content).codec == probe_video(path).codec and clip_suffix(content) == "mp4"
    assert len(decode_video(content)) == probe_video(content).frames  # nothing in it that needs what is left out
    assert trim_video(path.read_bytes(), first, last) == (content, index)


def test_trimming_leaves_out_what_is_not_needed(made):
    path = made("h264-open-gop")  # a key frame every eighth
    content, index = trim_video(path, 9, 10)
    assert index == 1 and probe_video(content).frames <= 6
    assert len(content) < 0.5 * path.stat().st_size


def test_trimming_keeps_codecs_that_mp4_does_not_hold(tmp_path):
    broken_clips.write_clip(tmp_path / "x.mkv", broken_clips.scene(), "ffv1")
    content, index = trim_video(tmp_path / "x.mkv", 13, 15)
    assert clip_suffix(content) == "mkv"
    assert trim_video(tmp_path / "x.mkv", 13, 15) == (content, index)  # nothing random in it
    assert np.array_equal(
        decode_video(content, range(index, index + 3)), decode_video(tmp_path / "x.mkv", [13, 14, 15])
    )


def test_what_cannot_be_trimmed_is_refused(made):
    with pytest.raises(ValueError, match=r"frames 5 to 20; .* has frames 0 to 19"):
        trim_video(made("h264"), 5, 20)
    with pytest.raises(ValueError, match="frames 5 to 4"):
        trim_video(made("h264"), 5, 4)
    with pytest.raises(ValueError, match="does not time every packet"):
        trim_video(made("edit-list"), 2, 6)


def test_a_frame_that_cannot_be_decoded_is_an_error_and_not_its_neighbour(made):
    """decord would show another frame in its place."""
    content = bytearray(made("h264").read_bytes())
    with av.open(str(made("h264"))) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][12]
    content[packet.pos : packet.pos + packet.size] = bytes(packet.size)
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode_video(bytes(content))
    assert np.array_equal(decode_video(bytes(content), 8), decode_video(made("h264"), 8))
