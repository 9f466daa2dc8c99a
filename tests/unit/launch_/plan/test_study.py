"""A plan of a study against what the study does on a small model."""

import json

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from launch.main import main
from launch.plan.study import plan_study
from launch.study.command import STUDIES, run_study, study_class
from launch.study.config import DEMO_BASE, StudyConfig
from launch.study.denoising import Denoiser
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline

SIZES = {"steps": 2, "frames": 9, "height": 32, "width": 48, "measured_steps": 2}
#: Options that make a study small, where its defaults are not.
SMALL = {
    "masking": {"ratios": (0.3, 0.6), "video_ratios": (0.5,), "spare": (1,), "by_head": False},
    "profile": {"ratios": (0.5,)},
    "skip-sinks": {"sink_heads": ("1:0",), "draws": 1},
    "retraining": {"ratios": (0.5,)},
    "temperature": {"temperatures": (0.5, 1.0), "video_temperatures": (0.5,)},
}


#: Every study on Mochi; on Wan, whose pipeline calls the model twice a step, one of each kind of work.
PLANNED = [
    *(("mochi", name) for name in STUDIES),
    *(("wan", name) for name in ("masking", "profile", "retraining", "transfer")),
]


@pytest.mark.parametrize(("family", "name"), PLANNED)
def test_a_study_calls_the_model_as_often_as_planned(name, family, tmp_path, monkeypatch):
    prompts, base = tmp_path / "prompts.txt", DEMO_BASE
    prompts.write_text("a red circle moves right\na blue star grows\n" if name == "transfer" else "a red circle\n")
    if family != "mochi":
        base = tmp_path / "base"
        make_pipeline(family).save_pretrained(base)
    sizes = SIZES | ({"frames": 7} if family == "mochi" else {})
    layers = (1, 2) if name in ("masking", "skip-sinks") else (1,)
    config = StudyConfig(out=tmp_path / "out", base=str(base), prompts=prompts, layers=layers, **sizes)
    study, work = study_class(name)(**SMALL.get(name, {})), Workbench(config)
    plan = plan_study(study, work, base / "transformer" / "config.json")
    calls = 0

    def counted(self, *args, **kwargs):
        found = make(self, *args, **kwargs)
        forward = self._transformer.forward

        def seen(*args, **kwargs):
            nonlocal calls
            calls += 1
            return forward(*args, **kwargs)

        self._transformer.forward = seen
        return found

    make = Denoiser.__init__
    monkeypatch.setattr(Denoiser, "__init__", counted)
    monkeypatch.setattr("launch.study.command.write_page", lambda *arguments: None)  # which calls no model
    run_study(study, config, {})
    assert calls == plan.calls


@pytest.mark.parametrize("family", ["mochi", "wan", "hunyuan_video", "cogvideox"])
def test_a_calls_operations_are_those_of_the_pipelines(family, tmp_path):
    base = DEMO_BASE
    if family != "mochi":
        base = tmp_path / "base"
        make_pipeline(family).save_pretrained(base)
    config = StudyConfig(out=tmp_path / "out", base=str(base), **SIZES | ({"frames": 7} if family == "mochi" else {}))
    work = Workbench(config)
    plan = plan_study(study_class("masking")(), work, base / "transformer" / "config.json")
    calls = []
    work.denoiser.draw("a red circle moves right over a blue star and " * 60, 0, on_call=calls.append)  # cut
    assert work.rows_and_calls == (len(calls[0].passes), len(calls) // 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # whose products are all counted
        work.again(calls[0])
    assert counter.get_total_flops() == pytest.approx(plan.flops, rel=0.02)
    model = work.denoiser.split_model
    assert plan.weights == sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])


def test_a_published_base_is_planned_without_its_weights(tmp_path, capsys):
    options = ["--base", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "--frames", "81", "--height", "480", "--width", "832"]
    main(["plan", "--study", "masking", *options, "--dtype", "bfloat16", "--json", str(tmp_path / "plan.json")])
    said, plan = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "Wan 2.1, 30 blocks" in said and "GPU hours" in said
    # A forward pass of docs/benchmarks.md: `reblock plan` counts 245 + 37.7 TFLOP for the training step's.
    assert plan["flops"] == pytest.approx(283e12, rel=0.01) and plan["weights"] == pytest.approx(2.84e9, rel=0.02)
    assert plan["total_flops"] == plan["calls"] * plan["flops"]
    with pytest.raises(SystemExit):
        main(["plan", "--study"])
    assert "got study '', expected one of" in capsys.readouterr().err
