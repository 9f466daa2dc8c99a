"""The study of masking: its figures against a dense computation, planted heads and layers found."""

import numpy as np
import pytest
import torch

from launch.study.config import StudyConfig
from launch.study.denoising import CONDITIONAL, UNCONDITIONAL
from launch.study.masking import Masking
from launch.study.recorders import row_by_row
from launch.study.study import Results, Unit
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline
from trainer.attention import dense as reference

LAYERS = (0, 3, 4, 7)
PLANTED = {4: 3, 5: 0, 6: 3, 7: 1}  # layer: head, recipes/demo_base/planted.json


def config(tmp_path, **options):
    given = {"steps": 3, "frames": 7, "height": 32, "width": 32, "measured_steps": 2, "out": tmp_path}
    return StudyConfig(**{**given, **options})


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red circle moves right\na blue star grows\n")
    return Workbench(config(tmp_path_factory.mktemp("study"), prompts=prompts, layers=LAYERS))


@pytest.fixture(scope="module")
def results(work):
    study = Masking(ratios=(0.3, 0.8), layer_ratio=0.7, video_ratios=(0.6,), spare=(3,))
    units = [Unit(prompt, 0, variant) for prompt in (0, 1) for variant in study.variants(work)]
    return study, Results({unit: study.measure(unit, work).arrays for unit in units})


def brute_force(ratio):
    """Attention without the smallest weights of each head, in float64."""

    def mask(q, k, v, row):
        weights = reference.attention_weights(q, k)
        ordered = weights.flatten(2).sort(dim=-1).values
        at = reference.rank(ratio, ordered.shape[-1])
        kept = (weights >= ordered[..., at][..., None, None]) | (weights == weights.amax(-1, keepdim=True))
        return ((weights * kept / (weights * kept).sum(-1, keepdim=True)) @ v.double()).to(v.dtype)

    return row_by_row(mask)


def test_d_is_that_of_masking_by_definition(work, results):
    _, measured = results
    calls = work.dense(0, 0).calls
    assert [call.step for call in calls] == work.measured_steps == [0, 2]
    for layer in (0, 3):
        found = []
        for call in calls:
            masked = work.again(call, {layer: brute_force(0.7)}).double()
            change = (masked - call.prediction).flatten(1).square().sum(1) / call.prediction.double().flatten(
                1
            ).square().sum(1)
            found.append(dict(zip(call.passes, change.tolist(), strict=True)))
        arrays = measured[Unit(0, 0, f"layer-{layer:02d}")]
        for name in (CONDITIONAL, UNCONDITIONAL):
            assert float(arrays[name][0]) == pytest.approx(np.mean([one[name] for one in found]), rel=1e-3)
        assert 0.6 < float(arrays["realised"][0]) <= 0.7 and 0 < float(arrays["dropped"][0]) < 0.7


def test_a_planted_head_bears_masking_by_its_making(results):
    """Its weights are exactly 0 but at the sink, and ties stay."""
    _, measured = results
    for layer, head in PLANTED.items() & {(layer, PLANTED.get(layer)) for layer in LAYERS}:
        by_head = measured.stack(f"layer-{layer:02d}", f"head_{CONDITIONAL}").mean(axis=0)
        assert by_head[head] < 1e-10 < 1e-7 < np.delete(by_head, head).min()


def test_more_masked_changes_more_and_spared_layers_stay(work, results):
    _, measured = results
    every = measured.stack("all", CONDITIONAL).mean(axis=0)
    assert every[1] > every[0] > 0
    but_one = tuple(layer for layer in LAYERS if layer != 3)
    spared = Masking(ratios=(0.7,), spare=but_one).measure(Unit(0, 0, "except"), work).arrays
    assert spared[CONDITIONAL] == measured[Unit(0, 0, "layer-03")][CONDITIONAL]
    video = measured[Unit(1, 0, "video-0.6")]
    assert 5 < float(video["psnr"]) < 60 and 0 < float(video["ssim"]) < 1 and float(video["realised"]) <= 0.6


def test_findings_name_the_most_sensitive_layer(work, results):
    study, measured = results
    found = study.findings(measured, work)
    sensitivity = {int(layer): value["D"] for layer, value in found.values["sensitivity"].items()}
    top = max(sensitivity, key=sensitivity.get)
    assert f"layer {top} changes the prediction most" in found.sentences[0]
    assert found.tables["layers"].rows[0][0] == top and len(found.tables["layers"].rows) == len(LAYERS)
    assert {name for name, _ in found.figures.items()} == {"ratios", "layers", "heads"}
    assert {row[1] for row in found.tables["ratios"].rows} == {CONDITIONAL, UNCONDITIONAL}


def test_a_planted_sensitive_layer_and_head_are_found(tmp_path):
    """Wan with random weights, whose layer 2 has large values in its head 1."""
    pipe = make_pipeline("wan")
    with torch.no_grad():
        attention = pipe.transformer.blocks[2].attn1
        attention.to_out[0].weight.mul_(8.0)
        attention.to_v.weight[12:].mul_(8.0)  # of two heads, 12 wide
    pipe.save_pretrained(tmp_path / "base")
    work = Workbench(config(tmp_path / "out", base=str(tmp_path / "base"), frames=9, width=48))
    study = Masking(ratios=(0.5,), layer_ratio=0.5, video_ratios=())
    units = [Unit(0, 0, variant) for variant in study.variants(work)]
    found = study.findings(Results({unit: study.measure(unit, work).arrays for unit in units}), work)
    change = {int(layer): value["D"] for layer, value in found.values["sensitivity"].items()}
    assert max(change, key=change.get) == 2 and change[2] > 5 * sorted(change.values())[-2]
    heads = found.values["by_head"]["2"]
    assert heads["1"] > 5 * heads["0"]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"ratios": (0.5, 0.3)}, "those of ratios rising"),
        ({"layer_ratio": 1.0}, "below 1"),
        ({"spare": (9,)}, r"got spare \[9\]"),
    ],
)
def test_faults_are_named(work, options, said):
    with pytest.raises(ValueError, match=said):
        Masking(**options).check(work)
