"""The study of structure on whole models: maps that no caption reaches stay the same under every prompt."""

import json

import numpy as np
import pytest
import torch

from launch.study import command
from launch.study.config import StudyConfig
from launch.study.denoising import CONDITIONAL, UNCONDITIONAL
from launch.study.structure import Structure
from launch.study.study import Results, Unit
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline
from tests.support.tiny_families import make

PROMPTS = ["a red circle moves left", "a blue circle moves right"]
LAYERS = (0, 1)


def bench(out, family, **options):
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    base = None
    if family != "mochi":
        make_pipeline(family).save_pretrained(out / family)
        base = str(out / family)
    size = {"frames": 7 if family == "mochi" else 9, "height": 32, "width": 32, "steps": 2, "measured_steps": 2}
    return StudyConfig(
        out=out, base=base, prompts=out / "prompts.txt", layers=LAYERS, guidance=3.0, **{**size, **options}
    )


def silence_captions(work):
    """Captions no longer reach the model, though they are among its keys."""
    pipe = work.denoiser.sampler.pipe
    with torch.no_grad():
        if work.use.family.name == "wan":
            for block in pipe.transformer.blocks:
                block.attn2.to_out[0].weight.zero_()
                block.attn2.to_out[0].bias.zero_()
        else:  # T5 has no biases: it embeds every text as zeros
            pipe.text_encoder.shared.weight.zero_()


@pytest.mark.parametrize("family", ["mochi", "wan"])
def test_maps_that_no_caption_reaches_are_equal_under_all_prompts(family, tmp_path):
    work, study = Workbench(bench(tmp_path, family)), Structure()
    study.check(work)
    silence_captions(work)
    results = {prompt: study.measure(Unit(prompt, 0, "maps"), work).arrays for prompt in (0, 1)}
    text = results[0][f"{CONDITIONAL}_text_tokens"]
    assert (text > 0).all() == (family == "mochi") and np.array_equal(text, results[1][f"{CONDITIONAL}_text_tokens"])
    found = study._compared(Results({Unit(p, 0, "maps"): a for p, a in results.items()}), f"{CONDITIONAL}_map")
    assert [one.title for one in found] == ["other prompt, same seed"]
    assert found[0].overall("same")[0] == pytest.approx(1, abs=1e-6)
    assert found[0].overall("same", "layer_others")[0] > 0.01
    for name in (CONDITIONAL, UNCONDITIONAL):
        assert results[0][f"{name}_map"].shape[:3] == (2, len(LAYERS), work.heads)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "cogvideox"])
def test_what_each_family_has_is_found(family, tmp_path):
    work = Workbench(bench(tmp_path, family, seeds=(0, 1), heads=(1, 0)))
    other = None
    if family == "wan":
        other = str(tmp_path / "other")
        pipeline = make_pipeline(family)
        pipeline.transformer = make("wan", seed=1, in_channels=16, out_channels=16)
        pipeline.save_pretrained(other)
    study = Structure(other=other)
    units = [Unit(p, seed, variant) for p in (0, 1) for seed in (0, 1) for variant in study.variants(work)]
    found = study.findings(Results({unit: study.measure(unit, work).arrays for unit in units}), work)
    rows = {(row[0], row[2]): row for row in found.tables["similarity"].rows if row[1] == "map"}
    passes = [CONDITIONAL] if family == "hunyuan_video" else [CONDITIONAL, UNCONDITIONAL]
    kinds = {"other prompt, same seed", "other prompt, other seed", "same prompt, other seed"}
    kinds |= {"other model, same prompt and seed"} if other else set()
    assert set(rows) == {(name, kind) for name in passes for kind in kinds}
    if other:
        same, others = (float(cell) for cell in rows[CONDITIONAL, "other model, same prompt and seed"][3:5])
        assert abs(same - others) < 0.1  # independent weights: the heads of two models have nothing in common
        assert float(rows[CONDITIONAL, "other prompt, same seed"][3]) > same + 0.1
    assert (np.array(found.values["shares"]["text"]) > 0).all() == (family != "wan")
    assert ("text" in found.figures) == (family != "wan")
    assert np.array(found.values["shares"]["diagonal"]).shape == (len(LAYERS), 2)


@pytest.mark.slow
def test_the_page_says_what_was_found(tmp_path):
    page = command.run_study(Structure(shown_layers=(1,)), bench(tmp_path, "mochi", steps=3, heads=(1, 3)), {})
    text, written = page.read_text(), {path.name for path in page.parent.iterdir()}
    assert "correlates" in text and "2 prompts give no interval; 6 would." in text and "use --seeds [0,1]" in text
    assert {"maps-step-00.svg", "maps-step-02.png", "maps-prompts.svg", "similarity.csv", "text.png"} <= written
    found = json.loads((page.parent / "findings.json").read_text())
    assert set(found) >= {"shares", "uniform", "similarity_map"}
    assert np.array(found["shares"]["stripes"]).shape == (len(LAYERS), 2)


def test_faults_are_named(tmp_path):
    work = Workbench(bench(tmp_path, "mochi"))
    with pytest.raises(ValueError, match=r"got shown_layers \[5\], expected some of the studied layers \[0, 1\]"):
        Structure(shown_layers=(5,)).check(work)
    with pytest.raises(ValueError, match="got side 1 and fine 512"):
        Structure(side=1).check(work)
    make_pipeline("wan").save_pretrained(tmp_path / "wan")
    with pytest.raises(ValueError, match="got frames 7"):
        Structure(other=str(tmp_path / "wan")).check(work)
