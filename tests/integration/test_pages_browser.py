"""The pages that commands write, opened from disk in a real browser."""

import shutil

import pytest

from launch.main import main
from tests.support.browser import BROWSER, look
from tests.support.reported_run import write_planted_base, write_run

pytestmark = pytest.mark.skipif(
    shutil.which(BROWSER) is None, reason=f"needs Debian's {BROWSER}: make test installs it"
)


def test_the_page_of_a_study_shows_its_figures_and_plays_its_videos(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moves right\na blue star grows\n")
    sizes = ["--steps", "3", "--frames", "13", "--height", "32", "--width", "32", "--measured_steps", "1"]
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"), "--by_head", "false"]
    main(["study", "masking", *options, *sizes])
    (folder,) = (tmp_path / "out" / "masking").iterdir()
    seen = look(folder / "report.html", tmp_path)
    assert seen.title == "masking · reblock study" and seen.errors == []
    assert len(seen.pictures) == 2 and min(seen.pictures) > 300  # ratios and layers
    assert [video["width"] for video in seen.videos] == [32] * 4  # dense and masked, of two prompts
    assert all(0.2 < video["at"] < 1.1 for video in seen.videos), seen.videos
    assert seen.height > 1000


def test_the_page_of_a_run_shows_its_charts_and_plays_its_samples(tmp_path):
    run = write_run(tmp_path / "run", write_planted_base(tmp_path / "base"))
    main(["report", str(run)])
    seen = look(run / "report.html", tmp_path)
    assert seen.errors == [] and "reblock" in seen.title
    assert len(seen.charts) >= 4 and min(seen.charts) > 100
    assert len(seen.videos) > 0 and all(video["width"] > 0 and video["at"] > 0 for video in seen.videos), seen.videos


def test_a_page_with_faults_is_seen_to_have_them(tmp_path):
    """The look itself: a picture and a video that cannot be shown, an error of a script, a request to the network."""
    (tmp_path / "page.html").write_text(
        '<html><head><title>t</title></head><body><img src="no.png"><video src="no.mp4"></video>'
        '<script>nothing()</script><img src="https://example.org/a.png"></body></html>'
    )
    seen = look(tmp_path / "page.html", tmp_path)
    assert seen.pictures == [0, 0] and seen.videos[0]["width"] == 0 and "fault" in seen.videos[0]
    assert any("nothing is not defined" in error for error in seen.errors)
