"""Sampling: variants, seeds, masking of the retrained blocks, what is kept, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLMochi, FlowMatchEulerDiscreteScheduler, MochiPipeline

from data.synth.command import CAPTION_WORDS
from data.video.decode import decode_video
from launch.demo.assemble_base import caption_tokenizer, small_text_encoder
from launch.sample.command import sample
from launch.sample.contact_sheet import strip
from launch.sample.generate import IDENTICAL_DB, Painter, Settings, bottom_masked, likeness
from trainer.attention.dense import attention_weights, masked_attention, pooled_quantiles
from trainer.models.layout import AttentionCall, TokenLayout

SMALL = {"steps": 3, "frames": 7, "height": 16, "width": 64}
CAPTIONS = ["a red circle moves left", "a blue star grows"]


def _pipeline(folder: Path, transformer) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            latents_mean=(0.0,) * 12,
            latents_std=(1.0,) * 12,
            layers_per_block=(1, 1, 1, 1, 1),
        )
    tokenizer = caption_tokenizer(CAPTION_WORDS)
    MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=vae,
        text_encoder=small_text_encoder(len(tokenizer), 16, 0),
        tokenizer=tokenizer,
        transformer=transformer,
        force_zeros_for_empty_prompt=True,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, make_transformer) -> tuple[Path, Path]:
    """Base, and a "retrained" folder that names block 2."""
    folder = tmp_path_factory.mktemp("pipelines")
    base = _pipeline(folder / "base", make_transformer(0, in_channels=12))
    retrained = _pipeline(folder / "retrained", make_transformer(1, in_channels=12))
    (retrained / "reblock.json").write_text(json.dumps({"blocks": [2], "base": "base", "weights": "ema", "step": 9}))
    return base, retrained


@pytest.fixture(scope="module")
def drawn(pipelines, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn")
    base, retrained = pipelines
    sample(out, base=base, retrained=retrained, captions=CAPTIONS, mask_ratio=0.9, seed=5, **SMALL)
    return out


def test_every_variant_of_every_caption_is_written(drawn: Path):
    entries = json.loads((drawn / "samples.json").read_text())
    assert [(e["caption"], e["variant"], e["seed"]) for e in entries] == [
        (caption, variant, 5 + i)
        for i, caption in enumerate(CAPTIONS)
        for variant in ("base", "retrained", "retrained-masked")
    ]
    for entry in entries:
        assert decode_video(drawn / entry["file"]).shape == (7, 16, 64, 3)
        assert (entry["frames"], entry["fps"]) == (7, 12)
        masked = entry["variant"] == "retrained-masked"
        assert (entry["psnr_to_dense"] is not None) == (entry["ssim_to_dense"] is not None) == masked
    assert (drawn / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_draws_nothing_and_other_settings_draw_anew(drawn: Path, pipelines, capsys, monkeypatch):
    base, retrained = pipelines
    before = {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.mp4")}
    painted = []
    real = Painter.draw

    def draw(self, caption, seed, functions, tick):
        painted.append((caption, bool(functions)))
        return real(self, caption, seed, functions, tick)

    monkeypatch.setattr(Painter, "draw", draw)
    call = {"base": base, "retrained": retrained, "captions": CAPTIONS, "seed": 5, **SMALL}
    sample(drawn, mask_ratio=0.9, **call)
    assert "6 of 6 videos exist" in capsys.readouterr().out
    assert painted == []
    assert {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.mp4")} == before
    # Another ratio needs the dense pixels again, but not the base's.
    sample(drawn, mask_ratio=0.5, **call)
    assert painted == [(CAPTIONS[0], False), (CAPTIONS[0], True), (CAPTIONS[1], False), (CAPTIONS[1], True)]


def test_the_seed_decides_and_masking_changes_only_its_blocks(pipelines):
    base, _ = pipelines
    painter = Painter(base, Settings(seed=0, guidance=4.5, fps=12, dtype="float32", **SMALL), "cpu")
    nothing = lambda: None  # noqa: E731
    first = painter.draw(CAPTIONS[0], 1, {}, nothing)
    assert np.array_equal(first, painter.draw(CAPTIONS[0], 1, {}, nothing))
    assert not np.array_equal(first, painter.draw(CAPTIONS[0], 2, {}, nothing))
    assert not np.array_equal(first, painter.draw(CAPTIONS[0], 1, {2: bottom_masked(0.95)}, nothing))
    assert likeness(painter.draw(CAPTIONS[0], 1, {2: bottom_masked(0.0)}, nothing), first)[0] > 50
    assert np.array_equal(first, painter.draw(CAPTIONS[0], 1, {}, nothing))  # masking came off


def test_the_video_is_the_pipelines_own(pipelines):
    """Same noise, same empty negative prompt: what MochiPipeline draws when it is asked directly."""
    base, _ = pipelines
    painted = Painter(base, Settings(seed=0, guidance=4.5, fps=12, dtype="float32", **SMALL), "cpu").draw(
        CAPTIONS[0], 3, {}, lambda: None
    )
    pipe = MochiPipeline.from_pretrained(base)
    own = pipe(
        CAPTIONS[0], num_frames=7, height=16, width=64, num_inference_steps=3, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).frames[0]  # fmt: skip
    assert np.abs(painted.astype(int) - np.asarray(own) * 255).max() <= 1


def test_narrow_weights_draw_nearly_the_same(pipelines):
    base, _ = pipelines
    wide, narrow = (
        Painter(base, Settings(seed=0, guidance=4.5, fps=12, dtype=dtype, **SMALL), "cpu")
        for dtype in ("float32", "bfloat16")
    )
    seen = set()
    hook = narrow.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.add((kwargs["hidden_states"].dtype, kwargs["timestep"].dtype)),
        with_kwargs=True,
    )
    likely = likeness(narrow.draw(CAPTIONS[0], 1, {}, int), wide.draw(CAPTIONS[0], 1, {}, int))
    hook.remove()
    assert seen == {(torch.float32, torch.float32)}  # between steps, whatever the weights
    assert likely[0] > 25


def test_bottom_masked_equals_the_reference_without_padding():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 4, generator=generator)  # 6 vision tokens, up to 3 text tokens
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    out = bottom_masked(0.6)(q, k, v, AttentionCall(0, TokenLayout.of((1, 2, 3), (3, 1), mask)))
    for row, valid in ((0, 9), (1, 7)):
        weights = attention_weights(q[row : row + 1, :, :valid], k[row : row + 1, :, :valid])
        wanted, removed, _ = masked_attention(
            weights, v[row : row + 1, :, :valid], pooled_quantiles(weights, [0.6])[..., 0] * (1 - 1e-6)
        )
        assert removed.min() > 0.4
        torch.testing.assert_close(out[row : row + 1, :, :valid].double(), wanted, rtol=1e-4, atol=1e-5)
    assert not out[1, :, 7:].any()


def test_likeness_of_equal_and_of_different_videos():
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert likeness(video, video) == (IDENTICAL_DB, pytest.approx(1.0))
    darker = (video // 2).astype(np.uint8)
    error = np.mean((darker.astype(float) - video) ** 2)
    assert likeness(darker, video)[0] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)


def test_a_strip_shows_first_and_last_frame():
    video = np.arange(19, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    shown = strip(video, 4)
    assert shown.shape == (4, 4 * 6 + 3 * 2, 3)
    assert (shown[0, 0, 0], shown[0, -1, 0], shown[0, 6, 0]) == (0, 18, 255)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 8}, "6k \\+ 1"),
        ({"height": 24}, "multiples of 16"),
        ({"dtype": "float16"}, "'bfloat16'"),
        ({"frames": 8, "steps": 0}, "frames 8 .*; steps 0"),
        ({"mask_ratio": 0.5}, "retrained folder"),
        ({"mask_ratio": 1.0}, "ratio < 1"),
        ({"base": Path("nowhere")}, "does not exist"),
    ],
)
def test_faults_are_named_before_anything_is_loaded(tmp_path: Path, change: dict, message: str):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        sample(tmp_path / "out", **{"base": tmp_path / "base", **SMALL, **change})
    assert not (tmp_path / "out").exists()


def test_masking_needs_to_know_the_retrained_blocks(tmp_path: Path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="does not name the retrained blocks"):
        sample(tmp_path / "out", base=tmp_path, retrained=tmp_path, mask_ratio=0.5, **SMALL)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        sample(tmp_path / "out", base=tmp_path, **SMALL)
