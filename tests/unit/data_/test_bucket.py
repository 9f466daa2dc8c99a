"""Which bucket a clip goes to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.bucket import Bucket, choose_bucket, parse_buckets
from data.families import VIDEO_FAMILIES

BUCKETS = parse_buckets(["37x480x848", "37x848x480", "163x480x848", "37x640x640"])


@pytest.mark.parametrize(
    "height, width, frames, name",
    [
        (1080, 1920, 200, "163x480x848"),  # wide and long: the longest
        (1080, 1920, 100, "37x480x848"),  # too short for it
        (1920, 1080, 200, "37x848x480"),  # upright
        (1080, 1080, 200, "37x640x640"),  # square
        (480, 848, 37, "37x480x848"),  # exactly
        (479, 848, 37, None),  # would have to be enlarged
        (1080, 1920, 36, None),  # too short for all
    ],
)
def test_the_bucket_that_keeps_most(height, width, frames, name):
    chosen = choose_bucket(height, width, frames, BUCKETS)
    assert (chosen and chosen.name) == name


def test_enlarging_only_if_asked():
    assert choose_bucket(100, 100, 40, BUCKETS) is None
    assert choose_bucket(100, 100, 40, BUCKETS, upscale=True) == Bucket(37, 640, 640)


@given(
    height=st.integers(1, 3000), width=st.integers(1, 3000), frames=st.integers(1, 400), order=st.permutations(BUCKETS)
)
def test_the_choice_fits_and_does_not_depend_on_the_order(height, width, frames, order):
    chosen = choose_bucket(height, width, frames, order)
    assert chosen == choose_bucket(height, width, frames, BUCKETS)
    fitting = [b for b in BUCKETS if b.frames <= frames and b.height <= height and b.width <= width]
    assert (chosen is None) == (not fitting) and (chosen is None or chosen in fitting)


@pytest.mark.parametrize("text", ["163x480", "a", "20x64x64", "19x60x64", "19x64x0", "-19x64x64", "19x64x64x3"])
def test_wrong_names_are_refused(text):
    with pytest.raises(ValueError, match="expected"):
        Bucket.parse(text)


@pytest.mark.parametrize(
    ("family", "frames", "latent", "near"),
    [("wan", 81, 21, "5 or 9"), ("hunyuan_video", 129, 33, "5 or 9"), ("cogvideox", 49, 13, "1 or 9")],
)
def test_each_family_has_its_own_frames(family, frames, latent, near):
    bucket = Bucket.parse(f"{frames}x480x720", family)
    assert bucket.latent_shape(16) == (16, latent, 60, 90) and bucket.name == f"{frames}x480x720"
    title, step = VIDEO_FAMILIES[family].title, VIDEO_FAMILIES[family].frame_step
    with pytest.raises(ValueError, match=rf"got frames 7, expected {step} k \+ 1 for {title}, for example {near}"):
        Bucket(7, 32, 32, family)
    with pytest.raises(ValueError, match=f"got width 40, expected a multiple of 16 for {title}"):
        parse_buckets(["9x32x40"], family)
    with pytest.raises(ValueError, match="got family 'mocha', expected one of mochi, wan, hunyuan_video, cogvideox"):
        Bucket(7, 32, 32, "mocha")


def test_mochi_is_the_family_where_none_is_named():
    assert Bucket(7, 32, 32) == Bucket(7, 32, 32, "mochi")
    with pytest.raises(ValueError, match=r"^got frames 9, expected 6 k \+ 1, for example 7 or 13\.$"):
        Bucket(9, 32, 32)


def test_names_and_latents():
    assert Bucket.parse("163x480x848").latent_shape(12) == (12, 28, 60, 106)
    assert Bucket(19, 64, 64).name == "19x64x64" and Bucket.parse("19x64x64") == Bucket(19, 64, 64)
    for wrong in ([], ["19x64x64", "19x64x64"]):
        with pytest.raises(ValueError, match="each once"):
            parse_buckets(wrong)
