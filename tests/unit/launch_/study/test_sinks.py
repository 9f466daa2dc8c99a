"""The study of sinks: planted ones are found, a random model has none, figures are those of a float64 computation, and
the test of positions keeps its level whatever positions follow."""

import json
import math

import numpy as np
import pytest
import torch

from launch.study import sink_records
from launch.study.command import run_study
from launch.study.config import StudyConfig
from launch.study.sink_records import find_sinks, record
from launch.study.sink_tables import RECORDS, PassSinks, independent_owners
from launch.study.sinks import Sinks
from launch.study.study import Results, Unit
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline
from trainer.models.layout import dense_attention

PLANTED = ["4:3", "5:0", "6:3", "7:1"]
PASSES = ["conditional", "unconditional"]
EPS = (0.05, 0.3)


def options(folder, **changed):
    prompts = folder / "prompts.txt"
    prompts.write_text("a red circle moves left\na blue star grows\n")
    size = {"steps": 3, "frames": 13, "height": 48, "width": 48, "measured_steps": 2, "guidance": 3.0}
    return StudyConfig(**{"out": folder / "out", "prompts": prompts, "own_noise": True} | size | changed)


@pytest.fixture(scope="module")
def mochi(tmp_path_factory):
    """The workbench of the demo's base."""
    return Workbench(options(tmp_path_factory.mktemp("mochi")))


@pytest.fixture(scope="module", params=["wan", "hunyuan_video", "cogvideox"])
def other(request, tmp_path_factory):
    """The options of a random model."""
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline(request.param).save_pretrained(folder / "base")
    return options(folder, base=str(folder / "base"), frames=9, steps=2, measured_steps=1)


def found(path):
    return json.loads((path.parent / "findings.json").read_text())


@pytest.mark.slow
def test_planted_sinks_are_found_at_every_step_and_no_others(mochi):
    assert find_sinks(mochi, 0.3) == [(4, 3), (5, 0), (6, 3), (7, 1)]
    page = run_study(Sinks(), mochi.config, {})
    said = found(page)
    assert said["sink_heads"] == dict.fromkeys(PASSES, PLANTED)
    for name in PASSES:
        assert list(said["heads"][name]) == PLANTED
        for head in said["heads"][name].values():
            assert head["frequency"] == [1.0, 1.0]
            assert head["low"] == pytest.approx([0.3424, 0.3424], abs=1e-4) and head["high"] == [1.0, 1.0]  # two trials
    assert "Conditional pass: 4 of 32 heads (4:3, 5:0, 6:3, 7:1) have a sink at eps 0.3" in said["sentences"][0]
    assert "over 2 drawings that share neither prompt nor noise" in said["sentences"][1]
    for name in ("frequency", "steps", "prompts", "positions-conditional", "importance", "activations"):
        assert (page.parent / f"{name}.png").stat().st_size > 5000
    rows = (page.parent / "heads.csv").read_text().splitlines()
    assert len(rows) == 1 + 8 and rows[1].startswith("conditional,4,3,1.0,")


def test_a_random_model_has_none(other):
    page = run_study(Sinks(), other, {})
    said = found(page)
    assert all(heads == [] for heads in said["sink_heads"].values()) and said["sink_heads"]
    assert "has a sink at eps 0.3 on any call" in said["sentences"][0]
    assert not (page.parent / "heads.csv").exists() and (page.parent / "importance.csv").exists()
    assert find_sinks(Workbench(other), 0.3) == []


def test_figures_are_those_of_all_weights_in_float64(mochi):
    call, step, layer = mochi.dense(0, 0).calls[1], 1, 4
    seen = {}

    def attend(q, k, v, at):
        seen.update(
            q=q.double(), k=k.double(), v=v.double(), lengths=at.layout.text_lengths, vision=at.layout.num_vision
        )
        return dense_attention(q, k, v, at)

    mochi.again(call, {layer: attend})
    recorded, vision = record(mochi, 0, 0, EPS), seen["vision"]
    assert vision == math.prod(mochi.grid)
    weight = mochi.denoiser.split_model.blocks[layer].attn1.to_out[0].weight.double().detach()
    for row, name in enumerate(call.passes):
        valid = vision + seen["lengths"][row]
        q, k, v = (seen[part][row, :, :valid] for part in "qkv")
        weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
        mass = weights.sum(dim=1)
        for i, eps in enumerate(EPS):
            heavy = (weights > eps).double().mean(dim=1)[:, :vision].amax(dim=1)
            assert recorded[f"fraction_{name}"][step, layer, :, i] == pytest.approx(heavy.numpy(), abs=1e-6)
        importance = mass / mass.mean(dim=1, keepdim=True)
        top, key = importance[:, :vision].max(dim=1)
        assert recorded[f"importance_{name}"][step, layer] == pytest.approx(top.numpy(), rel=1e-5)
        assert recorded[f"alpha_key_{name}"][step, layer].tolist() == key.tolist()
        text = importance[:, vision:].amax(dim=1).numpy() if valid > vision else np.zeros(4)
        assert recorded[f"text_importance_{name}"][step, layer] == pytest.approx(text, rel=1e-5)
        for head in range(4):
            projected = v[head, :vision] @ weight[:, head * 24 : (head + 1) * 24].T
            for figure, values in (("value_norm_ratio", v[head, :vision]), ("projected_value_norm_ratio", projected)):
                norms = values.norm(dim=1)
                ratio = norms[key[head]] / (norms.sum() - norms[key[head]]) * (vision - 1)
                assert recorded[f"{figure}_{name}"][step, layer, head] == pytest.approx(float(ratio), rel=1e-4)


def test_the_importance_of_a_uniform_head_is_one(mochi):
    queries = mochi.denoiser.split_model.blocks[2].attn1
    own, text = (part.weight[24:48].detach().clone() for part in (queries.to_q, queries.add_q_proj))
    with torch.no_grad():
        queries.to_q.weight[24:48] = queries.add_q_proj.weight[24:48] = 0.0
        seen = record(mochi, 0, 0, EPS)
        queries.to_q.weight[24:48], queries.add_q_proj.weight[24:48] = own, text
    for name in PASSES:
        assert seen[f"importance_{name}"][:, 2, 1] == pytest.approx(1.0, rel=1e-5)
        assert (seen[f"importance_{name}"][:, 2, [0, 2, 3]] > 1.1).all()


def test_a_massive_entry_is_found_at_its_token_and_channel_and_hooks_come_off(mochi):
    blocks = mochi.denoiser.split_model.blocks

    def spike(block, inputs, output):
        output[0][:, 7, 5] = -1e5
        return output

    handle = blocks[3].register_forward_hook(spike)
    seen = record(mochi, 1, 0, EPS)
    handle.remove()
    for name in PASSES:
        assert (seen[f"stream_largest_{name}"][:, 3] == 1e5).all() and (seen[f"stream_token_{name}"][:, 3] == 7).all()
        assert (seen[f"stream_channel_{name}"][:, 3] == 5).all() and (seen[f"stream_median_{name}"][:, 3] < 10).all()
        assert (seen[f"stream_largest_{name}"][:, :3] < 1000).all()
    handle = blocks[3].register_forward_hook(lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        record(mochi, 1, 0, EPS)
    handle.remove()
    assert all(not block._forward_hooks for block in blocks)


def test_prompts_share_their_noise_unless_told_otherwise(tmp_path):
    small = {"steps": 2, "frames": 7, "height": 32, "width": 32, "measured_steps": 2}
    shared, own = (Workbench(options(tmp_path, own_noise=own, **small)) for own in (False, True))
    for work, same in ((shared, True), (own, False)):
        first = [work.dense(prompt, 3).calls[0] for prompt in (0, 1)]
        assert [call.step for call in first] == [0, 0]
        assert torch.equal(*(call.inputs["hidden_states"] for call in first)) == same
    assert np.array_equal(shared.draw(1, 3), shared.dense(1, 3).pixels)
    assert np.array_equal(own.draw(1, 3), own.dense(1, 3).pixels) and not np.array_equal(
        own.draw(1, 3), shared.draw(1, 3)
    )


def test_drawings_of_a_test_share_neither_prompt_nor_noise():
    pairs = [(prompt, seed) for prompt in range(3) for seed in (4, 9)]
    assert independent_owners(pairs, own_noise=True) == {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 2}
    assert independent_owners(pairs, own_noise=False) == {0: 0, 3: 1}
    assert independent_owners([(0, 4), (1, 4), (2, 4)], own_noise=False) == {0: 0}


def sinks_at(work, keys):
    """Records in which heads 0 and 1 of layers 0 and 1 have a sink at keys (prompts, seeds, 2 steps)."""
    measured = {}
    for (prompt, seed, _), _ in np.ndenumerate(keys[..., :1]):
        key, fraction = np.full((2, 8, 4, 1), math.prod(work.grid) - 1), np.zeros((2, 8, 4, 1))
        key[:, :2, :2] = keys[prompt, seed][:, None, None, None]
        fraction[:, :2, :2] = 0.9
        measured[Unit(prompt, seed, RECORDS)] = {"key_conditional": key, "fraction_conditional": fraction}
    return PassSinks(Results(measured), "conditional", work, [0.3], 0.3)


@pytest.mark.parametrize("follows", ["noise", "prompt", "both"])
def test_positions_that_are_drawn_evenly_are_called_uneven_at_the_level_of_the_test(mochi, follows, monkeypatch):
    monkeypatch.setattr("trainer.callbacks.positions.PERMUTATIONS", 99)
    work = Workbench(options(mochi.config.out.parent, own_noise=False))
    rng, tokens, draws = np.random.default_rng(0), math.prod(work.grid), 120
    false = np.zeros(2)
    for _ in range(draws):
        of_noise, of_prompt = rng.integers(tokens, size=(1, 6, 1)), rng.integers(tokens, size=(6, 1, 1))
        chance = {"noise": 0.0, "prompt": 1.0, "both": 0.5}[follows]
        keys = np.where(rng.random((6, 6, 2)) < chance, of_prompt, of_noise)
        p = sinks_at(work, keys).position_p()
        false += np.array([p["frame_p"], p["place_p"]]) <= 0.05
    assert (false / draws <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)).all(), false
    assert false.sum() > 0


def test_positions_in_the_first_frame_are_called_uneven(mochi):
    rng, (_, height, width) = np.random.default_rng(1), mochi.grid
    first = sinks_at(mochi, rng.integers(height * width, size=(8, 1, 2)))
    p = first.position_p()
    assert p["frame_p"] == 0.0005 and p["place_p"] > 0.05
    assert first.position_p((0, 1)) == p
    frames, places = first.counts()
    assert frames.tolist() == [[16, 0, 0]] * 4 and places.sum() == 64
    shared = Workbench(options(mochi.config.out.parent, own_noise=False))
    assert math.isnan(sinks_at(shared, np.zeros((8, 1, 2), int)).position_p()["frame_p"])


def test_sinks_are_those_of_any_pass_that_nearly_all_prompts_have(mochi, monkeypatch):
    def recorded(work, prompt, seed, eps):
        fraction = {name: np.zeros((2, 8, 4, 1)) for name in PASSES}
        fraction["conditional"][:, 1, 2] = fraction["unconditional"][:, 0, 3] = 0.6
        fraction["conditional"][:, 5, 0] = 0.5  # half is not over half
        fraction["conditional"][prompt, 6, 1] = fraction["unconditional"][:, 7, 1 + prompt] = 0.6
        return {f"fraction_{name}": values[:, work.layers] for name, values in fraction.items()}

    mochi.dense(0, 0)  # which tells the passes
    monkeypatch.setattr(sink_records, "record", recorded)
    assert find_sinks(mochi, 0.3) == [(0, 3), (1, 2)]
    assert find_sinks(Workbench(options(mochi.config.out.parent, heads=(0, 2, 3), layers=(1, 6))), 0.3) == [(1, 2)]


def test_thresholds_are_checked():
    for eps, default in (((0.3,), 0.2), ((0.3, 1.0), 0.3), ((0.3, 0.3), 0.3)):
        with pytest.raises(ValueError, match="expected different values above 0 and below 1 that include"):
            Sinks(eps=eps, default_eps=default).check(None)
