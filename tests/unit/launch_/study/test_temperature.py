"""Temperature of one layer: its control, its limit, and the entropy of its rows."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.main import main
from launch.study.config import StudyConfig
from launch.study.denoising import CONDITIONAL
from launch.study.study import Unit
from launch.study.temperature import Temperature, normalised_entropy, uniform
from launch.study.workbench import Workbench, rows_by_pass
from tests.support.attention_draws import draw_heads
from tests.support.family_bases import make_pipeline
from trainer.attention import dense as reference
from trainer.attention.interventions import temperature
from trainer.models.layout import AttentionCall, TokenLayout

SIZE = {"steps": 2, "height": 32, "width": 32, "measured_steps": 1}
LAYER = 1


@pytest.fixture(scope="module", params=["mochi", "wan"])
def work(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    base = None
    if request.param != "mochi":
        base = str(folder / "base")
        make_pipeline(request.param).save_pretrained(base)
    frames = 7 if request.param == "mochi" else 9
    return Workbench(StudyConfig(out=folder / "out", base=base, frames=frames, **SIZE))


@pytest.fixture(scope="module")
def study():
    return Temperature(temperatures=(0.5, 1.0, 3.0))


@pytest.fixture(scope="module")
def found(work, study):
    """What is measured of one layer."""
    return study.measure(Unit(0, 0, f"layer-{LAYER:02d}"), work).arrays


def test_one_changes_no_bit_and_the_others_change_that_layer(work, study, found):
    for call in work.dense(0, 0).calls:
        assert torch.equal(work.again(call, dict.fromkeys(work.layers, temperature(1.0))), call.prediction)
    changed = work.mean_errors(0, 0, {LAYER: temperature(3.0)})
    for name in work.passes:
        assert found[name][1] == 0.0
        assert found[name][2] == changed[name] > 0.0
    control = study.measure(Unit(0, 0, "control"), work)
    assert np.array_equal(control.video, work.dense(0, 0).pixels)


def test_a_video_is_of_its_layer_and_temperature(work, study):
    measured = study.measure(Unit(0, 0, f"video-{LAYER:02d}-3"), work)
    assert np.array_equal(measured.video, work.draw(0, 0, {LAYER: temperature(3.0)}))
    assert not np.array_equal(measured.video, work.dense(0, 0).pixels) and measured.arrays["psnr"] < 100


def test_a_high_temperature_predicts_what_uniform_attention_does(work, found):
    """At T = 1e12 all weights are 1 / M in float32: what is left is the order of sums of M terms, in every block."""
    keys = math.prod(work.grid) + 512
    tolerance = (len(work.layers) * keys * 2.0**-24) ** 2
    for call in work.dense(0, 0).calls:
        hot, flat = (work.again(call, {LAYER: function}).double() for function in (temperature(1e12), uniform))
        for name, rows in rows_by_pass(call.passes):
            size = call.prediction[rows].double().square().sum()
            assert (hot[rows] - flat[rows]).square().sum() / size < tolerance
            assert found[name][-1] == pytest.approx(
                float((flat[rows] - call.prediction[rows]).square().sum() / size), rel=1e-5
            )
            assert found[name][-1] > 1e3 * tolerance


def test_the_entropies_are_of_their_pass_and_of_the_layers_own_rows(work, study, found):
    (call, *others) = work.dense(0, 0).calls
    kept = {}

    def keep(q, k, v, attention_call):
        lengths = attention_call.layout.text_lengths
        for row, name in enumerate(work.denoiser.passes):
            valid = attention_call.layout.num_vision + lengths[row]
            kept[name] = q[row : row + 1, :, :valid], k[row : row + 1, :, :valid]
        return temperature(1.0)(q, k, v, attention_call)

    for each in (call, *others):
        work.again(each, {LAYER: keep})
    assert set(kept) == set(work.passes)
    for name, (q, k) in kept.items():
        for place, value in enumerate(study.temperatures):
            exact = reference.row_statistics(q.double() / value, k)[2].mean(dim=-1)[0] / math.log(k.shape[2])
            torch.testing.assert_close(torch.from_numpy(found[f"entropy_{name}"][place]), exact, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["random", "sharp", "sink", "diagonal"]), st.integers(0, 999), st.integers(2, 30),
    st.lists(st.floats(0.1, 20.0), min_size=2, max_size=2, unique=True).map(sorted),
)  # fmt: skip
def test_entropy_rises_with_temperature_in_every_head(kind, seed, tokens, values):
    q, k, _ = draw_heads(kind, seed, 1, 3, tokens, 16)
    low, high = (normalised_entropy(q, k, value) for value in values)
    assert (low <= high + 1e-6).all() and (high <= 1 + 1e-6).all()
    if values[1] > 1.2 * values[0] and kind == "random":
        assert (low < high).all()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["random", "sharp", "sink"]), st.integers(0, 999), st.floats(0.05, 1e6))
def test_the_distance_to_uniform_attention_is_bounded_by_the_largest_logit_over_t(kind, seed, value):
    """Weights at T lie between e^(-2a) / M and e^(2a) / M, where a is the largest |logit| / T."""
    q, k, v = draw_heads(kind, seed, 1, 2, 12, 16)
    call = AttentionCall(0, TokenLayout((1, 1, 12), (0,), 0, None))
    a = float(reference.logits(q, k).abs().max()) / value
    difference = (temperature(value)(q, k, v, call) - uniform(q, k, v, call)).abs().max()
    rounding = 4 * 12 * 2.0**-24 * v.abs().max()
    assert difference <= min(math.expm1(min(2 * a, 50.0)), 2.0) * v.abs().max() + rounding


@pytest.mark.parametrize(
    "options, said",
    [
        ({"temperatures": (0.5, 2.0)}, r"got temperatures \[0.5, 2.0\], expected 1, the control"),
        ({"temperatures": (0.0, 1.0)}, "expected rising positive numbers"),
        ({"video_temperatures": (2.0, 0.5)}, r"got video_temperatures \[2.0, 0.5\], expected rising"),
        ({"video_layers": (99,)}, r"got video_layers \[99\], expected some of the studied layers"),
    ],
)
def test_faults_are_named(work, options, said):
    with pytest.raises(ValueError, match=said):
        Temperature(**options).check(work)


@pytest.mark.slow
def test_the_page_names_the_most_and_the_least_sensitive_layer(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moves right\n")
    main(
        ["study", "temperature", "--out", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--frames", "7"]
        + [str(part) for name, value in SIZE.items() for part in (f"--{name}", value)]
        + ["--layers", "[0,3,4]", "--temperatures", "[1,2]", "--video_temperatures", "[2]", "--video_layers", "[3]"]
    )
    (folder,) = (tmp_path / "temperature").iterdir()
    values = json.loads((folder / "findings.json").read_text())
    change = {layer: found["D"]["2"] for layer, found in values[CONDITIONAL].items()}
    most, least = max(change, key=change.get), min(change, key=change.get)
    said = [s for s in values["sentences"] if s.startswith("At T = 2, conditional pass")]
    assert said[0].startswith(
        f"At T = 2, conditional pass, the most sensitive is layer {most}, D = {change[most]:.3g}"
    ) and said[0].endswith(f"the least sensitive is layer {least}, D = {change[least]:.3g}.")
    assert "Control, conditional pass: T = 1 changes no bit of any prediction." in values["sentences"]
    rows = (folder / "videos.csv").read_text().splitlines()
    assert rows[1].startswith("all studied,1,100,1,0,0") and rows[2].startswith("03,2,")
    assert (folder / "temperatures-conditional.png").is_file() and (folder / "entropy-unconditional.svg").is_file()
