"""The study of retraining: a model beside itself differs in nothing, a re-initialised one in its last blocks."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from launch.study.command import run_study
from launch.study.config import DEMO_BASE, StudyConfig
from launch.study.retraining import Retraining, high_frequency_share, write_untrained
from launch.study.study import Results, Unit
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retraining")
    (folder / "prompts.txt").write_text("a red circle moves right\n")
    sizes = {"steps": 2, "frames": 13, "height": 48, "width": 48, "measured_steps": 1}
    return StudyConfig(out=folder / "out", prompts=folder / "prompts.txt", **sizes)


@pytest.fixture(scope="module")
def studied(config):
    """The demo's base beside itself under two names, and beside itself re-initialised."""
    study = Retraining(controls={"itself": str(DEMO_BASE)}, ratios=(0.5,))
    work = Workbench(config)
    results = Results({Unit(0, 0, name): study.measure(Unit(0, 0, name), work).arrays for name in study.variants(work)})
    return study, work, results


def test_a_model_beside_itself_differs_in_nothing(studied):
    study, work, results = studied
    base, itself = results[Unit(0, 0, "base")], results[Unit(0, 0, "itself")]
    for name, values in base.items():
        assert np.array_equal(values, itself[name], equal_nan=True), name
    assert float(itself["psnr"]) == 100.0  # identical pixels
    found = study.findings(results, work)
    rows = {row[0]: row[1:] for row in found.tables["differences"].rows}
    assert rows["itself"][:-1] == ["0"] * 5 and rows["retrained"][:-1] != ["0"] * 5


def test_what_stands_in_for_a_retrained_model_has_other_last_blocks_alone(studied):
    _, work, results = studied
    folder = work.config.out / "untrained"
    before, after = (load_file(next((f / "transformer").glob("*.safetensors"))) for f in (DEMO_BASE, folder))
    changed = {name.split(".")[1] for name, value in before.items() if not (value.float() == after[name].float()).all()}
    assert changed == {"6", "7"}
    # Fresh blocks are the identity, so masking them changes nothing.
    layers = results[Unit(0, 0, "retrained")]["layers"]
    assert layers[6] == layers[7] == 0.0 and layers[:6].min() > 0.0
    written = (folder / "reblock.json").stat().st_mtime_ns
    write_untrained(DEMO_BASE, folder, 2, torch.float32)
    assert (folder / "reblock.json").stat().st_mtime_ns == written


def test_fine_detail_is_what_lies_beyond_half_of_the_nyquist_frequency():
    y, x = np.mgrid[:32, :32]

    def video(wave):
        return np.repeat(wave[None, :, :, None], 3, axis=3).round().astype(np.uint8)

    shares = {period: high_frequency_share(video(128 + 100 * np.cos(2 * np.pi * x / period))) for period in (2, 8, 32)}
    assert shares[2] == pytest.approx(1.0) and shares[8] < 1e-3 and shares[32] < 1e-3
    both = 128 + 60 * np.cos(np.pi * x) + 60 * np.cos(2 * np.pi * y / 16)  # energies 2 to 1
    assert high_frequency_share(video(both)) == pytest.approx(2 / 3, abs=0.01)
    assert high_frequency_share(np.full((2, 8, 8, 3), 7, np.uint8)) == 0.0


def test_faults_are_named(config, tmp_path):
    work = Workbench(config)
    make_pipeline("wan").save_pretrained(tmp_path / "wan")
    for options, said in (
        ({"ratios": ()}, "expected shares above 0"),
        ({"controls": {"base": str(DEMO_BASE)}}, r"got controls named \['base'\]"),
        ({"retrained": "nowhere"}, "'nowhere' does not exist"),
        ({"retrained": str(tmp_path / "wan")}, "is no retrained .* their configs differ in"),
    ):
        with pytest.raises(ValueError, match=said):
            run_study(Retraining(**options), config, options, work)
