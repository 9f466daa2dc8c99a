"""Calls of a transformer in its family's pipeline: seen, kept, repeated on the same inputs."""

import numpy as np
import pytest
import torch

from launch.sample.generate import SamplingConfig
from launch.study.config import DEMO_BASE
from launch.study.denoising import CONDITIONAL, UNCONDITIONAL, Denoiser, ModelCall
from tests.support.family_bases import make_pipeline
from trainer.attention.interventions import temperature

SIZE = {"frames": 9, "height": 32, "width": 48}
STEPS = 3


@pytest.fixture(scope="module", params=["mochi", "wan", "hunyuan_video", "cogvideox"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def denoiser(family, tmp_path_factory):
    config = {"seed": 0, "steps": STEPS, "guidance": 3.0, "fps": 8, "dtype": "float32", **SIZE}
    folder = DEMO_BASE
    if family == "mochi":
        config["frames"] = 7
    else:
        folder = tmp_path_factory.mktemp(family)
        make_pipeline(family).save_pretrained(folder)
    return Denoiser(folder, SamplingConfig(**config), "cpu")


@pytest.fixture(scope="module")
def drawn(denoiser):
    """The dense video and its calls."""
    calls = []
    return denoiser.draw("a red circle moves left", 1, on_call=calls.append), calls


def test_every_call_is_seen_with_its_step_and_passes(family, denoiser, drawn):
    video, calls = drawn
    passes = {
        "mochi": [(UNCONDITIONAL, CONDITIONAL)],
        "wan": [(CONDITIONAL,), (UNCONDITIONAL,)],
        "hunyuan_video": [(CONDITIONAL,)],
        "cogvideox": [(UNCONDITIONAL, CONDITIONAL)],
    }[family]
    assert [call.passes for call in calls] == passes * STEPS
    assert [call.step for call in calls] == [step for step in range(STEPS) for _ in passes]
    assert np.array_equal(denoiser.draw("a red circle moves left", 1), video)  # seen or not, the same video


def test_the_passes_are_those_of_the_captions(denoiser, drawn):
    """The unconditional rows of two prompts' first calls have the same inputs, the conditional ones other text."""
    others = []
    denoiser.draw("a blue star grows", 1, on_call=others.append)
    text = [
        {
            name: row
            for call in calls
            if call.step == 0
            for name, row in zip(call.passes, call.inputs["encoder_hidden_states"], strict=True)
        }
        for calls in (drawn[1], others)
    ]
    assert not torch.equal(text[0][CONDITIONAL], text[1][CONDITIONAL])
    if UNCONDITIONAL in text[0]:
        assert torch.equal(text[0][UNCONDITIONAL], text[1][UNCONDITIONAL])


def test_a_call_that_is_kept_and_repeated_predicts_the_same_bits(denoiser, drawn, tmp_path):
    for number, call in enumerate(drawn[1]):
        path = tmp_path / f"{number}.safetensors"
        call.write(path)
        read = ModelCall.read(path)
        assert (read.step, read.passes) == (call.step, call.passes)
        assert torch.equal(denoiser.again(read), call.prediction)
        # An intervention that changes nothing, and one that does.
        assert torch.equal(denoiser.again(read, {1: temperature(1.0)}), call.prediction)
        assert not torch.equal(denoiser.again(read, {1: temperature(0.2)}), call.prediction)


def test_watching_comes_off_when_something_raises(denoiser):
    def stop(call):
        raise RuntimeError("enough")

    before = set(vars(denoiser.sampler.pipe.transformer))
    with pytest.raises(RuntimeError, match="enough"):
        denoiser.draw("a red circle moves left", 1, on_call=stop)
    assert set(vars(denoiser.sampler.pipe.transformer)) == before
