"""The study of skipped sink heads: a sink that does nothing is skipped for nothing, one that broadcasts is not."""

import json

import numpy as np
import pytest
import torch

from launch.study import skip_sinks
from launch.study.command import run_study
from launch.study.config import StudyConfig
from launch.study.skip_sinks import SkipSinks
from launch.study.skipped_heads import heads_of, shortfalls, skip
from launch.study.study import Results, Unit
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline
from trainer.attention.interventions import skip_heads

PLANTED = [(4, 3), (5, 0), (6, 3), (7, 1)]
NAMES = ("4:3", "5:0", "6:3", "7:1")
LAYERS, HEADS = range(8), range(4)


def options(folder, **changed):
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moves left\na blue star grows\n")
    size = {"steps": 3, "frames": 13, "height": 48, "width": 48, "measured_steps": 2, "guidance": 3.0}
    return StudyConfig(**{"out": folder / "out", "prompts": prompts} | size | changed)


@pytest.fixture(scope="module")
def mochi(tmp_path_factory):
    """The workbench of the demo's base."""
    return Workbench(options(tmp_path_factory.mktemp("mochi")))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The workbench of a random Wan."""
    folder = tmp_path_factory.mktemp("wan")
    make_pipeline("wan").save_pretrained(folder / "base")
    return Workbench(options(folder, base=str(folder / "base"), frames=9, steps=2, measured_steps=1))


def measured(study, work):
    """Arrays of all units of the first prompt."""
    study.check(work)
    units = [Unit(0, 0, variant) for variant in study.variants(work)]
    return {unit: study.measure(unit, work).arrays for unit in units}


def means(arrays, name="D_conditional"):
    """D of the sinks, and its mean over the controls of either kind."""
    found = {}
    for unit, each in arrays.items():
        found.setdefault(unit.variant.partition("-")[0], []).append(each[name].mean())
    return {kind: np.mean(values) for kind, values in found.items()}


@pytest.mark.slow
def test_planted_sinks_that_do_nothing_are_skipped_for_nothing(mochi):
    page = run_study(SkipSinks(draws=2), mochi.config, {})
    said = json.loads((page.parent / "findings.json").read_text())
    assert said["sink_heads"] == list(NAMES)
    for name in ("conditional", "unconditional"):
        errors = {kind: value["D"] for kind, value in said["D"][name].items()}
        assert 0 < errors["sinks"] < 0.01 * min(errors["same"], errors["other"])
        assert any(text.startswith(f"{name.capitalize()} pass: without the 4 sink heads") for text in said["sentences"])
    videos = [line.split(",") for line in (page.parent / "videos.csv").read_text().replace('"', "").splitlines()]
    assert float(videos[1][1]) > 10 + float(videos[2][2]) and videos[1][0] == "sink heads"  # PSNR
    assert len(list((page.parent / "videos").iterdir())) == 2 * 3
    assert (page.parent / "errors.png").stat().st_size > 5000


def test_sinks_that_broadcast_are_skipped_at_a_cost(tmp_path):
    work = Workbench(options(tmp_path))
    with torch.no_grad():
        for layer, head in PLANTED:
            # The sink's value outweighs all other heads, which Mochi's norm after the projection then makes small.
            work.denoiser.split_model.blocks[layer].attn1.to_v.weight[head * 24 : (head + 1) * 24] *= 1000.0
    study = SkipSinks(draws=2, video_draws=0)
    arrays = measured(study, work)
    assert study.heads(work) == PLANTED  # still found
    for name in ("D_conditional", "D_unconditional"):
        errors = means(arrays, name)
        assert errors["sinks"] > 1.5 * max(errors["same"], errors["other"])


def test_skipping_nothing_changes_no_bit(mochi, wan):
    for work in (mochi, wan):
        for call in work.dense(0, 0).calls:
            assert torch.equal(work.again(call, dict.fromkeys(work.layers, skip_heads([]))), call.prediction)
    assert skip([]) == {}


@pytest.mark.parametrize("family", ["mochi", "wan"])
def test_a_skipped_head_is_one_without_columns_in_the_output_projection(mochi, wan, family):
    work = {"mochi": mochi, "wan": wan}[family]
    model, skipped = work.denoiser.split_model, [(0, 0), (1, 1)]
    call = work.dense(0, 0).calls[0]
    found = work.again(call, skip(skipped))
    weights = []
    for layer, head in skipped:
        attention = model.attention_module(model.blocks[layer])
        width = attention.to_out[0].weight.shape[1] // model.num_heads
        outputs = [attention.to_out[0], *([attention.to_add_out] if family == "mochi" else [])]
        weights += [(linear.weight, slice(head * width, (head + 1) * width)) for linear in outputs]
    before = [weight[:, columns].detach().clone() for weight, columns in weights]
    with torch.no_grad():
        for weight, columns in weights:
            weight[:, columns] = 0.0
        expected = work.again(call)
        for (weight, columns), values in zip(weights, before, strict=True):
            weight[:, columns] = values
    assert (expected - call.prediction).norm() > 1e-3 * call.prediction.norm()
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert torch.equal(work.again(call), call.prediction)


def test_no_sink_gives_a_page_without_figures(wan):
    page = run_study(SkipSinks(draws=1), wan.config, {})
    said = json.loads((page.parent / "findings.json").read_text())
    assert said["sentences"] == [
        "No head of the studied layers is a sink at eps 0.3: nothing was skipped and there are no figures."
    ]
    assert said["sink_heads"] == [] and not list(page.parent.glob("*.csv")) and not (page.parent / "videos").exists()


def test_given_heads_are_not_looked_for(mochi, monkeypatch, tmp_path):
    monkeypatch.setattr(skip_sinks, "find_sinks", lambda *_: pytest.fail("looked"))
    path = tmp_path / "findings.json"
    path.write_text(json.dumps({"sink_heads": {"conditional": ["5:0"], "unconditional": ["5:0", "2:1"]}}))
    for study, expected in (
        (SkipSinks(sinks=path, draws=1, video_draws=0), [(2, 1), (5, 0)]),
        (SkipSinks(sink_heads=("4:2",), draws=1, video_draws=0), [(4, 2)]),
    ):
        arrays = measured(study, mochi)
        mask = arrays[Unit(0, 0, "sinks")]["skipped"]
        assert list(map(tuple, np.argwhere(mask))) == expected
        for kind in ("same-0", "other-0"):
            control = arrays[Unit(0, 0, kind)]["skipped"]
            assert control.sum() == len(expected) and not (control & mask).any()
    calls = mochi.dense(0, 0).calls
    expected = np.mean([mochi.relative_errors(call, skip([(4, 2)]))["conditional"] for call in calls])
    assert arrays[Unit(0, 0, "sinks")]["D_conditional"].mean() == expected


def test_results_of_other_heads_are_not_mixed(mochi):
    arrays = {}
    for prompt, names in enumerate((["4:3"], ["5:0"])):
        study = SkipSinks(sink_heads=names, draws=1, video_draws=0)
        study.check(mochi)
        arrays |= {Unit(prompt, 0, v): study.measure(Unit(prompt, 0, v), mochi).arrays for v in study.variants(mochi)}
    with pytest.raises(ValueError, match="measured with different sink heads"):
        study.findings(Results(arrays), mochi)


def test_controls_are_as_many_other_heads_and_differ_between_draws():
    sinks = [(4, 3), (4, 1), (6, 0)]
    drawn = {kind: [heads_of(f"{kind}-{i}", sinks, LAYERS, HEADS, 5) for i in range(6)] for kind in ("same", "other")}
    for heads in drawn["same"]:
        assert sorted(layer for layer, _ in heads) == [4, 4, 6] and not set(heads) & set(sinks)
        assert {head for layer, head in heads if layer == 4} == {0, 2}  # all that are left
    assert len({tuple(heads) for heads in drawn["same"][:3]}) == 3  # of three that there are
    for heads in drawn["other"]:
        assert len(set(heads)) == 3 and not {layer for layer, _ in heads} & {4, 6}
    assert len({tuple(heads) for heads in drawn["other"]}) == 6
    assert (
        heads_of("other-2", sinks, LAYERS, HEADS, 5)
        == drawn["other"][2]
        != heads_of("other-2", sinks, LAYERS, HEADS, 6)
    )
    assert heads_of("sinks", sinks, LAYERS, HEADS, 5) == sorted(sinks)
    assert shortfalls(sinks, LAYERS, HEADS) == []


def test_what_controls_are_short_of_is_said(mochi):
    sinks = [(4, 0), (4, 1), (4, 2), (5, 0)]
    assert shortfalls(sinks, [4, 5], HEADS) == [
        "Layer 4 has 3 sink heads and 1 others, so the control of the same layers skips 2 fewer there.",
        "Studied layers without sinks have 0 heads, so the control of other layers skips 4 fewer.",
    ]
    assert heads_of("same-0", sinks, [4, 5], HEADS, 0)[0] == (4, 3)
    assert heads_of("other-1", sinks, [4, 5], HEADS, 0) == []
    every = tuple(f"{layer}:{head}" for layer in LAYERS for head in HEADS)
    study = SkipSinks(sink_heads=every, draws=1, video_draws=0)
    study.check(mochi)
    arrays = {Unit(p, 0, v): study.measure(Unit(p, 0, v), mochi).arrays for p in (0, 1) for v in study.variants(mochi)}
    found = study.findings(Results(arrays), mochi)
    assert [row[1] for row in found.tables["errors"].rows] == ["sink heads", "sink heads"]
    assert "Layer 7 has 4 sink heads and 0 others" in " ".join(found.sentences)


@pytest.mark.parametrize(
    "given, said",
    [
        ({"sink_heads": ("8:0",)}, r"got sink heads 8:0, expected different ones of the studied layers \[0, 1"),
        ({"sink_heads": ("1:0", "1:0")}, "expected different ones"),
        ({"sink_heads": ("1-0",)}, "expected LAYER:HEAD"),
        ({"sinks": "nowhere.json"}, "which is no file; expected the findings.json of `reblock study sinks`"),
        ({"sinks": "prompts.txt"}, "without readable sink_heads"),
        ({"sinks": "prompts.txt", "sink_heads": ("1:0",)}, "expected one of them"),
        ({"video_draws": 4}, "got draws 3, draw_seed 0, video_draws 4"),
        ({"eps": 1.0}, "expected different values above 0 and below 1"),
    ],
)
def test_faults_are_named(mochi, given, said):
    folder = mochi.config.prompts.parent
    if "sinks" in given:
        given = given | {"sinks": folder / given["sinks"]}
    with pytest.raises(ValueError, match=said):
        SkipSinks(**given).check(mochi)
