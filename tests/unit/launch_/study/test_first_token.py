"""One text token: what stays is all that is read, controls change nothing, mass adds up to the text's share."""

import contextlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launch.main import main
from launch.study.config import StudyConfig
from launch.study.denoising import CONDITIONAL, UNCONDITIONAL
from launch.study.first_token import FirstToken, by_position
from launch.study.study import Unit
from launch.study.text_tokens import ALL, OneTextToken, caption_lengths, kept_token, text_site
from launch.study.workbench import Workbench, rows_by_pass
from tests.support.family_bases import make_pipeline
from trainer.attention import dense as reference
from trainer.models.layout import dense_attention

SIZE = {"steps": 2, "height": 32, "width": 32, "measured_steps": 1}
LAYER = 1


@pytest.fixture(scope="module", params=["mochi", "wan", "hunyuan_video", "cogvideox"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def work(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp(family)
    base = None
    if family != "mochi":
        base = str(folder / "base")
        make_pipeline(family).save_pretrained(base)
    return Workbench(StudyConfig(out=folder / "out", base=base, frames=7 if family == "mochi" else 9, **SIZE))


def of_families(*names):
    """The test is run on these families alone."""
    return pytest.mark.parametrize("family", names, indirect=True, scope="module")


@pytest.fixture(scope="module")
def study():
    return FirstToken()


def one_token(work, kind):
    lengths = caption_lengths(work, 0, 0)
    return OneTextToken(work.denoiser, {name: kept_token(kind, n, "seed") for name, n in lengths.items()})


def predicted(work, call, kind, *, pooled=False):
    """The prediction with one kind of token in every layer."""
    token = one_token(work, kind)
    with token.pooled() if pooled else contextlib.nullcontext():
        return work.again(call, dict.fromkeys(work.layers, token.attend), site=text_site(work.denoiser))


def has_pooled(family):
    return family in ("mochi", "hunyuan_video")


def test_all_tokens_change_no_bit_and_any_fewer_change_the_conditional_pass(family, work, study):
    without_text = []
    for end in ("", "-pooled") if has_pooled(family) else ("",):
        found = {
            kind: study.measure(Unit(0, 0, f"model-{kind}{end}"), work).arrays for kind in ("first", "none", "all")
        }
        assert all(found["all"][name] == 0.0 for name in work.passes)
        assert found["first"][CONDITIONAL] > 1e-9 and found["none"][CONDITIONAL] > 1e-9
        assert found["first"][CONDITIONAL] != found["none"][CONDITIONAL]
        without_text.append(float(found["none"][CONDITIONAL]))
        if family == "mochi":  # its empty caption has no tokens
            assert found["first"][UNCONDITIONAL] == found["none"][UNCONDITIONAL] == 0.0
    assert len(set(without_text)) == len(without_text)  # the pooled caption is cut in its own units alone


@of_families("mochi", "wan", "cogvideox")  # HunyuanVideo's token refiner mixes the tokens before the blocks
@pytest.mark.parametrize("kind", ["first", "last", "random", "none"])
def test_nothing_but_the_token_that_stays_is_read(family, work, kind):
    """Other embeddings at the other positions leave the prediction as it is; at its own they do not."""
    pooled, lengths = has_pooled(family), caption_lengths(work, 0, 0)
    for call in work.dense(0, 0).calls:
        text = call.inputs["encoder_hidden_states"]
        noise = torch.randn(text.shape, generator=torch.Generator().manual_seed(1))
        if "encoder_attention_mask" in call.inputs:
            noise = noise * call.inputs["encoder_attention_mask"][..., None]
        others, own = text + noise, text.clone()
        for row, name in enumerate(call.passes):
            token = kept_token(kind, lengths[name], "seed")
            if token is not None:
                others[row, token] = text[row, token]
                own[row, token] += noise[row, token]
        before = predicted(work, call, kind, pooled=pooled)
        changed = {
            "others": replace(call, inputs=call.inputs | {"encoder_hidden_states": others}),
            "own": replace(call, inputs=call.inputs | {"encoder_hidden_states": own}),
        }
        # float32 rounding of sums over the keys, the text's own queries among the rows
        torch.testing.assert_close(predicted(work, changed["others"], kind, pooled=pooled), before, rtol=0, atol=2e-6)
        if kind != "none":
            after = predicted(work, changed["own"], kind, pooled=pooled)
            rows = [row for row, name in enumerate(call.passes) if name == CONDITIONAL]
            assert not rows or (after[rows] - before[rows]).abs().max() > 1e-4
        assert (work.again(changed["others"]) - call.prediction).abs().max() > 1e-4


@of_families("mochi", "hunyuan_video")  # in the others padding is read
def test_a_caption_of_one_token_loses_nothing(family, work):
    (call,) = work.dense(0, 0).calls
    mask = call.inputs["encoder_attention_mask"].clone()
    mask[:, 1:] = 0
    short = replace(call, inputs=call.inputs | {"encoder_attention_mask": mask})
    dense = work.again(short)
    assert not torch.equal(dense, call.prediction)
    assert torch.equal(predicted(work, short, "first"), dense)
    if family == "mochi":
        assert torch.equal(predicted(work, short, "first", pooled=True), dense)


@pytest.fixture(scope="module")
def seen(work):
    """q, k, v of a layer of the kept calls by pass, of one row without padded text that is no key."""
    kept = {}

    def keep(q, k, v, call):
        vision = call.layout.num_vision
        for row, name in enumerate(work.denoiser.passes):
            length = call.layout.text_lengths[row]
            if call.site == "cross":
                kept[name] = q[row], k[row], v[row], 0, vision
            else:
                kept[name] = *(x[row, :, : vision + length] for x in (q, k, v)), vision, vision
        return dense_attention(q, k, v, call)

    for call in work.dense(0, 0).calls:
        work.again(call, {LAYER: keep}, site=text_site(work.denoiser))
    return kept


@pytest.mark.parametrize("kind", ["none", "first", "last"])
def test_a_layer_reads_what_stays_as_dense_float64_attention_does(work, seen, kind):
    token, outputs = one_token(work, kind), {}

    def watch(q, k, v, call):
        out = token.attend(q, k, v, call)
        for row, name in enumerate(work.denoiser.passes):
            outputs[name] = out[row]
        return out

    for call in work.dense(0, 0).calls:
        work.again(call, {LAYER: watch}, site=text_site(work.denoiser))
    for name, (q, k, v, first, _) in seen.items():
        position = token.tokens[name]
        used = [*range(first), *([] if position is None else [first + position])]
        if used:
            expected = reference.attention_weights(q[None], k[None, :, used])[0] @ v[:, used].double()
        else:  # cross-attention without text
            expected = torch.zeros(q.shape, dtype=torch.float64)
        torch.testing.assert_close(outputs[name][:, : q.shape[1]].double(), expected, rtol=1e-5, atol=1e-5)


def test_the_mass_on_text_is_its_share_of_the_softmax(work, study, seen):
    found = study.measure(Unit(0, 0, "mass"), work).arrays
    for name, (q, k, _, first, vision) in seen.items():
        weights = reference.attention_weights(q[None, :, :vision], k[None])[0]
        expected = weights[:, :, first:].mean(dim=(0, 1)).numpy()
        np.testing.assert_allclose(found[name][LAYER], expected, rtol=1e-4, atol=1e-8)
        share = 1.0 - float(weights[:, :, :first].sum(dim=-1).mean())
        np.testing.assert_allclose(found[name][LAYER].sum(), share, rtol=1e-4, atol=1e-7)


def test_captions_are_counted_without_padding(family, work):
    lengths = caption_lengths(work, 0, 0)
    if family == "hunyuan_video":
        assert lengths == {CONDITIONAL: int(work.denoiser.sampler.pipe.encode_prompt(work.prompts[0])[2].sum())}
        return
    tokens = len(work.denoiser.sampler.pipe.tokenizer(work.prompts[0]).input_ids)
    assert lengths == {CONDITIONAL: tokens, UNCONDITIONAL: 0 if family == "mochi" else 1}


@of_families("mochi", "hunyuan_video")
def test_without_text_and_pooled_caption_the_prediction_is_that_of_the_empty_caption(family, work):
    (call,) = work.dense(0, 0).calls
    without = predicted(work, call, "none", pooled=True)
    if family == "mochi":
        rows = dict(rows_by_pass(call.passes))
        torch.testing.assert_close(without[rows[CONDITIONAL]], without[rows[UNCONDITIONAL]], rtol=0, atol=1e-5)
        assert torch.equal(without[rows[UNCONDITIONAL]], call.prediction[rows[UNCONDITIONAL]])
        return
    empty = work.denoiser.sampler.pipe.encode_prompt("")[1]
    by_hand = replace(call, inputs=call.inputs | {"pooled_projections": empty})
    assert torch.equal(without, predicted(work, by_hand, "none"))
    assert not torch.equal(without, predicted(work, call, "none"))


@of_families("mochi", "hunyuan_video")
def test_the_pooled_caption_comes_back_when_something_raises(work):
    (call,) = work.dense(0, 0).calls

    def stop():
        with one_token(work, "none").pooled():
            assert not torch.equal(work.again(call), call.prediction)
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        stop()
    assert torch.equal(work.again(call), call.prediction)


def test_a_layer_is_changed_by_itself(work, study):
    found = study.measure(Unit(0, 0, f"layer-{LAYER:02d}"), work).arrays
    for kind in ("first", "none"):
        functions = {LAYER: one_token(work, kind).attend}
        errors = work.mean_errors(0, 0, functions, site=text_site(work.denoiser))
        assert errors[CONDITIONAL] == found[f"{kind}_{CONDITIONAL}"] > 0


def test_videos_are_compared_with_the_dense_one_and_the_one_without_text(family, work, study):
    end = "-pooled" if has_pooled(family) else ""
    dense = work.dense(0, 0).pixels
    every, none = (study.measure(Unit(0, 0, f"video-{kind}{end}"), work) for kind in ("all", "none"))
    assert np.array_equal(every.video, dense) and not np.array_equal(none.video, dense)
    assert every.arrays["psnr"] == none.arrays["psnr_no_text"] == 100
    assert every.arrays["psnr_no_text"] == none.arrays["psnr"] < 100
    if has_pooled(family):
        assert not np.array_equal(study.measure(Unit(0, 0, "video-none"), work).video, none.video)
    if family == "mochi":  # the caption's pass has become that of the empty caption
        empty = work.denoiser.draw("", 0).astype(int)
        assert np.abs(empty - none.video).max() <= 1 < np.abs(empty - dense).max()


@given(st.integers(0, 300), st.integers(0, 99).map(str))
def test_kept_tokens_are_of_the_caption(length, seed):
    assert kept_token("all", length, seed) == ALL and kept_token("none", length, seed) is None
    tokens = [kept_token(kind, length, seed) for kind in ("first", "last", "random")]
    if length == 0:
        assert tokens == [None] * 3
        return
    assert tokens[:2] == [0, length - 1] and 0 <= tokens[2] < length
    assert tokens[2] == kept_token("random", length, seed)
    assert length < 3 or tokens[2] not in tokens[:2]


def test_the_mass_by_position_leaves_padding_apart():
    short, long = np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([[0.5, 0.1, 0.2, 0.1]])
    shown, names = by_position([short, long], [2, 3])
    assert names == ["0", "1", "2", "pad"]
    np.testing.assert_allclose(shown, [[0.3, 0.15, 0.2, (0.35 + 0.1) / 2]])
    assert by_position([short[:, :2], long[:, :3]], [2, 3])[1] == ["0", "1", "2"]


@pytest.mark.slow
def test_the_page_compares_the_first_token_with_its_controls(tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle moves right\na blue star\n")
    main(
        ["study", "first-token", "--out", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--frames", "7"]
        + [str(part) for name, value in SIZE.items() for part in (f"--{name}", value)]
        + ["--layers", "[3,4]", "--videos", "false"]
    )
    (folder,) = (tmp_path / "first-token").iterdir()
    values = json.loads((folder / "findings.json").read_text())
    change = {(row["scope"], row["kept"], row["pass"]): row["D"] for row in values["whole"]}
    said = values["sentences"][0]
    assert said.startswith(
        "In attention, conditional pass: with the first text token alone "
        f"D = {change['attention', 'first', CONDITIONAL]:.3g}"
    )
    assert f"without text {change['attention', 'none', CONDITIONAL]:.3g}." in said
    assert "no difference that can be told from noise" in said  # two prompts give no interval
    assert "with all tokens, no bit of any prediction changes" in said
    share = {int(layer): row["share of the first"] for layer, row in values["mass_conditional"].items()}
    top = max(share, key=share.get)
    assert any(f"share of the attention on text in layer {top}: {share[top]:.3g}" in s for s in values["sentences"])
    assert "The unconditional pass has no text tokens" in (folder / "report.html").read_text()
    assert {file.stem for file in folder.glob("*.png")} == {"layers", "mass-conditional", "first-conditional"}
