"""Maps of another prompt: from the target itself nothing changes; one layer gives what is computed by hand."""

import numpy as np
import pytest
import torch

from launch.study import command
from launch.study.config import StudyConfig
from launch.study.folder import StudyFolder
from launch.study.study import Unit
from launch.study.transfer import Source, Transfer, pull, source_rows, transferred
from launch.study.workbench import Workbench
from tests.support.family_bases import make_pipeline
from trainer.models.layout import AttentionCall, TokenLayout, dense_attention

FAMILIES = ["mochi", "wan", "hunyuan_video", "cogvideox"]
#: Of different numbers of words, the first two.
PROMPTS = ["a red circle", "a blue star moves down over a dark gray background", "a white square"]


def bench(out, family, prompts=PROMPTS, **options):
    (out / "prompts.txt").write_text("\n".join(prompts))
    base = None
    if family != "mochi":
        make_pipeline(family).save_pretrained(out / family)
        base = str(out / family)
    size = {"frames": 7 if family == "mochi" else 9, "height": 32, "width": 32, "steps": 2, "measured_steps": 1}
    return StudyConfig(
        out=out, base=base, prompts=out / "prompts.txt", guidance=3.0, **{"layers": (0, 1), **size, **options}
    )


@pytest.fixture(scope="module", params=FAMILIES)
def work(request, tmp_path_factory):
    return Workbench(bench(tmp_path_factory.mktemp(request.param), request.param))


def test_rows_of_a_pass_take_the_map_of_the_source():
    assert source_rows(2) == [0, 0] and source_rows(4) == [0, 0, 2, 2]


def predictions(work, captions, function):
    """What the model predicts in every call of a batch, with this attention in all layers."""
    calls = []
    work.denoiser.draw_together(captions, [0, 0], dict.fromkeys(work.layers, function), on_call=calls.append)
    return [call.prediction for call in calls]


def with_equal_maps(function):
    """`function` on q and k that are equal bit for bit in both rows of a pass; values stay."""

    def attend(q, k, v, call):
        rows = source_rows(len(q))
        return function(q[rows], k[rows], v, call)

    return attend


@pytest.mark.parametrize("tokens", ["vision", "all"])
def test_an_equal_source_changes_no_bit(work, tokens):
    captions = [work.prompts[1]] * 2
    dense, found = (predictions(work, captions, function) for function in (dense_attention, transferred(tokens)))
    if work.use.family.name != "wan":
        assert all(map(torch.equal, found, dense))
        return
    # On a CPU two rows of equal inputs differ in Wan's dense batch already, so source and target are not quite equal.
    rounding = max(float((call[0] - call[1]).abs().max()) for call in dense)
    assert 0 < rounding < 1e-5
    assert max(float((a - b).abs().max()) for a, b in zip(found, dense, strict=True)) < 10 * rounding


@pytest.mark.parametrize("tokens", ["vision", "all"])
def test_equal_queries_and_keys_change_no_bit_in_any_family(work, tokens):
    captions = [work.prompts[1]] * 2
    dense, found = (
        predictions(work, captions, with_equal_maps(function)) for function in (dense_attention, transferred(tokens))
    )
    assert all(map(torch.equal, found, dense))


def test_rows_have_their_own_captions_and_noise(work):
    """Of two drawn together each is the video that is drawn alone, to rounding; equal seeds are equal noise."""
    both = work.denoiser.draw_together(work.prompts[:2], [3, 4])
    alone = [work.denoiser.draw(work.prompts[0], 3), work.denoiser.draw(work.prompts[1], 4)]
    for video, reference in zip(both, alone, strict=True):
        assert np.abs(video.astype(int) - reference).max() <= 1
    assert np.abs(both[0].astype(int) - both[1]).max() > 8


def test_the_source_keeps_its_video_and_the_target_changes(work):
    captions = work.prompts[:2]
    dense = work.denoiser.draw_together(captions, [0, 1])
    given, video = work.denoiser.draw_together(captions, [0, 1], dict.fromkeys(work.layers, transferred("vision")))
    assert np.array_equal(given, dense[0]) and not np.array_equal(video, dense[1])


@pytest.mark.parametrize("layer", [0, 1])
def test_one_layer_alone_is_what_a_computation_by_hand_gives(work, layer):
    """The attention of every call, from stored q, k and v in float64; the other layer's is its own."""
    seen = {}

    def keep(function):
        def attend(q, k, v, call):
            seen.setdefault(call.layer, []).append((q, k, v, call, found := function(q, k, v, call)))
            return found

        return attend

    unit = Unit(1, 0, f"layer-{layer:02d}")
    functions = Transfer().functions(unit, work)
    assert set(functions) == {layer}
    functions = {number: keep(functions.get(number, dense_attention)) for number in work.layers}
    work.denoiser.draw_together([work.prompts[2], work.prompts[1]], [0, 0], functions)
    for number in work.layers:
        for q, k, v, call, found in seen[number]:
            vision = call.layout.num_vision
            for row, length in enumerate(call.layout.text_lengths):
                source = row - row % 2 if number == layer else row
                valid = vision + length if call.layout.text_tokens else vision
                own_q, own_k = q[row].double().clone(), k[row].double().clone()
                own_q[:, :vision], own_k[:, :vision] = q[source, :, :vision], k[source, :, :vision]
                logits = own_q[:, :valid] @ own_k[:, :valid].transpose(1, 2) / q.shape[-1] ** 0.5
                by_hand = torch.softmax(logits, dim=-1) @ v[row, :, :valid].double()
                assert torch.allclose(found[row, :, :valid].double(), by_hand, atol=1e-5)


def test_all_tokens_take_the_sources_text_too():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 1, 7, 4).unbind(0)
    call = AttentionCall(0, TokenLayout((1, 1, 5), (2, 2), 2, None))
    weights = torch.softmax(q[0].double() @ k[0].double().transpose(1, 2) / 2, dim=-1)
    assert torch.allclose(transferred("all")(q, k, v, call)[1].double(), weights @ v[1].double(), atol=1e-6)
    assert not torch.allclose(transferred("vision")(q, k, v, call)[1].double(), weights @ v[1].double(), atol=1e-2)


def test_captions_of_different_lengths_are_refused_for_all_tokens(work):
    family = work.use.family.name
    if family in ("wan", "cogvideox"):  # no text among the keys; as many tokens in every caption
        return Transfer(tokens="all").check(work)
    with pytest.raises(ValueError, match=r"got tokens all and captions of \[\d+, \d+, \d+\] text tokens.*--tokens vis"):
        Transfer(tokens="all").check(work)


def test_units_have_their_sources(work):
    def source(prompt, variant):
        return Transfer.source(Unit(prompt, 0, variant), work)

    assert [source(prompt, "all") for prompt in range(3)] == [Source(1, 0), Source(2, 0), Source(0, 0)]
    assert source(2, "layer-01") == Source(0, 0) and source(2, "identity") == Source(2, 0)
    assert source(2, "other-seed") == Source(2, 1000) and source(2, "unrelated") == Source(1, 1000)
    for unit in (Unit(p, 0, v) for p in range(3) for v in Transfer().variants(work)):
        assert Transfer.decoy(unit, work) not in (unit.prompt, Transfer.source(unit, work).prompt)


def test_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match="got 1 prompt, expected at least 2"):
        Transfer().check(Workbench(bench(tmp_path, "mochi", prompts=["one"])))
    with pytest.raises(ValueError, match="got tokens 'text', expected one of vision, all"):
        Transfer(tokens="text").check(Workbench(bench(tmp_path, "mochi")))


@pytest.mark.slow
def test_the_page_says_what_was_found(tmp_path):
    config = bench(tmp_path, "mochi", prompts=PROMPTS[:2], layers=(5,))
    page = command.run_study(Transfer(), config, {})
    folder = page.parent
    assert {"transfers.csv", "layers.csv", "layers.svg", "pull.png"} <= {path.name for path in folder.iterdir()}
    arrays = StudyFolder(folder, 12).arrays(Unit(0, 0, "identity"))
    assert arrays["target_psnr"] > 50 and np.isnan(arrays["pull"])  # drawn alone and in a batch: rounding
    arrays = StudyFolder(folder, 12).arrays(Unit(0, 0, "all"))
    assert arrays["target_psnr"] < 40 and arrays["pull"] == pull(arrays["source_coarse"], arrays["apart_coarse"])
    text = page.read_text()
    assert "With the maps of the next prompt in all studied layers" in text and text.count("<video") == 2 * (1 + 5)


def test_pull_is_the_share_of_the_way():
    assert pull(1.0, 2.0) == 0.5 and pull(0.0, 2.0) == 1.0 and pull(2.0, 2.0) == 0.0 and np.isnan(pull(0.0, 0.0))
