"""The contact sheet of samples: which frames it shows, and captions of any script."""

from pathlib import Path

import numpy as np
import pytest

from launch.sample.contact_sheet import frame_strip, write_contact_sheet


def test_a_strip_shows_first_and_last_frame():
    video = np.arange(19, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    shown = frame_strip(video, 4)
    assert shown.shape == (4, 4 * 6 + 3 * 2, 3)
    assert (shown[0, 0, 0], shown[0, -1, 0], shown[0, 6, 0]) == (0, 18, 255)


def test_captions_of_any_script_are_drawn_as_they_are(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    """Dollar signs are no formula, and a character that no font has is no warning."""
    videos = {"base": [np.zeros((7, 16, 64, 3), np.uint8)] * 2}
    write_contact_sheet(
        tmp_path / "sheet.png", ["costs $5 or $\\nothing", "\U0001d01e \U00012000"], videos, {"base": ["", "PSNR"]}
    )
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")
    assert not [str(warning.message) for warning in recwarn if "missing from" in str(warning.message)]
