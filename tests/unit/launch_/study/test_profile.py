"""The study of what each head bears, its file, and videos drawn by it."""

import json

import numpy as np
import pytest

from launch.main import main
from launch.study.config import StudyConfig
from launch.study.denoising import CONDITIONAL
from launch.study.masking import Masking
from launch.study.profile import Profile
from launch.study.profile_file import AttentionProfile
from launch.study.study import Unit
from launch.study.workbench import Workbench
from tests.unit.launch_.study.test_masking import PLANTED

SIZE = ["--steps", "4", "--frames", "7", "--height", "32", "--width", "32", "--measured_steps", "2"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle moves right\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, prompts):
    """Results of the command on the demo's base."""
    out = tmp_path_factory.mktemp("profile")
    options = ["--ratios", "[0.4,0.8]", "--tolerance", "1e-3", "--layers", "[2,4,7]"]
    main(["study", "profile", "--out", str(out), "--prompts", str(prompts), *SIZE, *options])
    return next((out / "profile").iterdir())


def test_the_file_holds_what_each_head_bears(folder):
    profile = AttentionProfile.read(folder / "profile.json")
    profile.check(8, 4)
    assert sorted(profile.layers) == [2, 4, 7] and profile.steps == 4
    for layer, head in PLANTED.items():
        if layer in profile.layers:
            assert profile.layers[layer][head] == 0.8  # a planted head can lose whatever is asked
    assert {sink[:2] for sink in profile.sinks} <= set(PLANTED.items()) and all(
        0 < sink[2] <= 1 for sink in profile.sinks
    )
    with np.load(folder / "results" / "000-0-layer-04.npz") as arrays:
        borne = arrays["worst"] <= 1e-3
    want = [0.0 if not first else 0.8 if second else 0.4 for first, second in borne]
    assert list(profile.layers[4]) == want and 0.0 < profile.mean_ratio < 0.8


def test_a_heads_change_is_that_of_the_study_of_masking(folder, prompts, tmp_path):
    sizes = {"steps": 4, "frames": 7, "height": 32, "width": 32, "measured_steps": 2}
    work = Workbench(StudyConfig(out=tmp_path, prompts=prompts, **sizes))
    masked = Masking(ratios=(0.8,), layer_ratio=0.8).measure(Unit(0, 0, "layer-04"), work).arrays
    with np.load(folder / "results" / "000-0-layer-04.npz") as arrays:
        np.testing.assert_allclose(arrays["D"][:, 1], masked[f"head_{CONDITIONAL}"], rtol=1e-12)
        assert (arrays["worst"] >= arrays["D"]).all()


def test_a_video_by_the_profile_is_nearer_than_one_masked_alike(folder):
    found = json.loads((folder / "findings.json").read_text())
    rows = {row.split(",")[0]: row for row in (folder / "videos.csv").read_text().splitlines()}
    assert "by the profile" in rows and len(found["sentences"]) == 2
    psnr = {
        name: float(np.load(folder / "results" / f"000-0-{name}.npz")["psnr"]) for name in ("by-profile", "uniform")
    }
    assert psnr["by-profile"] > psnr["uniform"]
    assert (folder / "videos" / "000-0-by-profile.mp4").is_file()


def test_a_profile_of_nothing_changes_nothing(folder, prompts, tmp_path):
    profile = AttentionProfile.read(folder / "profile.json")
    nothing = dict.fromkeys(profile.layers, (0.0,) * 4)
    for name, changes in {"nothing": {"layers": nothing}, "dense": {"dense_steps": (0, 1, 2, 3)}}.items():
        path = tmp_path / f"{name}.json"
        AttentionProfile(**{**vars(profile), **changes}).write(path)
        options = ["--prompts", str(prompts), *SIZE, "--file", str(path)]
        main(["study", "profile", "--out", str(tmp_path / name), *options])
        (found,) = (tmp_path / name / "profile").iterdir()
        assert float(np.load(found / "results" / "000-0-by-profile.npz")["psnr"]) == 100.0  # identical pixels
    AttentionProfile(**{**vars(profile), "layers": dict.fromkeys(profile.layers, (0.8,) * 4)}).write(path)
    main(["study", "profile", "--out", str(tmp_path / name), *options])  # another profile in the file of this name
    results = {
        float(np.load(file)["psnr"]) for file in (tmp_path / name).glob("profile/*/results/000-0-by-profile.npz")
    }
    assert len(results) == 2 and min(results) < 60


def test_dense_steps_are_of_as_many_steps(folder, tmp_path, capsys):
    profile = AttentionProfile.read(folder / "profile.json")
    AttentionProfile(**{**vars(profile), "dense_steps": (0,)}).write(tmp_path / "profile.json")
    with pytest.raises(SystemExit):
        main(
            [
                "study",
                "profile",
                "--out",
                str(tmp_path),
                *SIZE,
                "--steps",
                "6",
                "--file",
                str(tmp_path / "profile.json"),
            ]
        )
    assert "got 6 steps, expected 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: f | {"format": "2"}, "another format"),
        (lambda f: f | {"layers": {"4": [0.1, 1.0, 0.0, 0.0]}}, "expected 0 <= share < 1"),
        (lambda f: {k: v for k, v in f.items() if k != "layers"}, "is no attention profile"),
        (lambda f: f | {"layers": {"9": [0.1] * 4}}, "of another model"),
        (lambda f: f | {"layers": {"4": [0.1] * 3}}, "of another model"),
    ],
)
def test_a_wrong_file_is_named_before_anything_is_drawn(folder, tmp_path, capsys, change, said):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(change(json.loads((folder / "profile.json").read_text()))))
    with pytest.raises(SystemExit):
        main(["study", "profile", "--out", str(tmp_path / "out"), *SIZE, "--file", str(path)])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_ratios_and_tolerances_are_checked(tmp_path):
    work = Workbench(StudyConfig(out=tmp_path))
    for options in ({"ratios": ()}, {"ratios": (0.5, 0.2)}, {"tolerance": 0.0}, {"step_tolerance": -1.0}):
        with pytest.raises(ValueError, match="expected"):
            Profile(**options).check(work)
