"""One video: its seed, its masked blocks, and that it is what diffusers' own pipeline gives."""

import numpy as np
import pytest
import torch
from diffusers import MochiPipeline

from launch.sample.generate import IDENTICAL_DB, SamplingConfig, VideoSampler, bottom_masked, psnr_and_ssim
from trainer.attention.dense import attention_weights, masked_attention, pooled_quantiles
from trainer.models.layout import AttentionCall, TokenLayout

SMALL = {"steps": 3, "frames": 7, "height": 16, "width": 64}
CAPTIONS = ["a red circle moves left", "a blue star grows"]


def test_the_seed_decides_and_masking_changes_only_its_blocks(pipelines):
    base, _ = pipelines
    sampler = VideoSampler(base, SamplingConfig(seed=0, guidance=4.5, fps=12, dtype="float32", **SMALL), "cpu")
    nothing = lambda: None  # noqa: E731
    first = sampler.sample(CAPTIONS[0], 1, {}, nothing)
    assert np.array_equal(first, sampler.sample(CAPTIONS[0], 1, {}, nothing))
    assert not np.array_equal(first, sampler.sample(CAPTIONS[0], 2, {}, nothing))
    assert not np.array_equal(first, sampler.sample(CAPTIONS[0], 1, {2: bottom_masked(0.95)}, nothing))
    assert psnr_and_ssim(sampler.sample(CAPTIONS[0], 1, {2: bottom_masked(0.0)}, nothing), first)[0] > 50
    assert np.array_equal(first, sampler.sample(CAPTIONS[0], 1, {}, nothing))  # masking came off


def test_the_video_is_the_pipelines_own(pipelines):
    """Same noise, same empty negative prompt: what MochiPipeline draws when it is asked directly."""
    base, _ = pipelines
    sampled = VideoSampler(base, SamplingConfig(seed=0, guidance=4.5, fps=12, dtype="float32", **SMALL), "cpu").sample(
        CAPTIONS[0], 3, {}, lambda: None
    )
    pipe = MochiPipeline.from_pretrained(base)
    own = pipe(
        CAPTIONS[0], num_frames=7, height=16, width=64, num_inference_steps=3, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).frames[0]  # fmt: skip
    assert np.abs(sampled.astype(int) - np.asarray(own) * 255).max() <= 1


def test_narrow_weights_draw_nearly_the_same(pipelines):
    base, _ = pipelines
    wide, narrow = (
        VideoSampler(base, SamplingConfig(seed=0, guidance=4.5, fps=12, dtype=dtype, **SMALL), "cpu")
        for dtype in ("float32", "bfloat16")
    )
    seen = set()
    hook = narrow.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.add((kwargs["hidden_states"].dtype, kwargs["timestep"].dtype)),
        with_kwargs=True,
    )
    likely = psnr_and_ssim(narrow.sample(CAPTIONS[0], 1, {}, int), wide.sample(CAPTIONS[0], 1, {}, int))
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


def test_psnr_and_ssim_of_equal_and_of_different_videos():
    video = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    assert psnr_and_ssim(video, video) == (IDENTICAL_DB, pytest.approx(1.0))
    darker = (video // 2).astype(np.uint8)
    error = np.mean((darker.astype(float) - video) ** 2)
    assert psnr_and_ssim(darker, video)[0] == pytest.approx(10 * np.log10(255**2 / error), rel=1e-4)
