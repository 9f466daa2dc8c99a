"""Each family's own pipeline: what it is asked for, which attention is masked in it, and its dtypes."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch

from data.families import COGVIDEOX, HUNYUAN_VIDEO, MOCHI, VIDEO_FAMILIES
from launch.sample.command import sample
from launch.sample.generate import SamplingConfig, VideoSampler, bottom_masked, psnr_and_ssim
from launch.sample.pipelines import check_pipeline, pipeline_use
from tests.support.family_bases import COGVIDEOX_TOKENS, make_pipeline
from tests.support.tiny_families import TINY, inputs, make, stock_forward
from trainer.attention import dense as reference
from trainer.models.families import split_model_of

OTHERS = ("wan", "hunyuan_video", "cogvideox")
SIZE = {"frames": 9, "height": 32, "width": 48}
VISION = 3 * 2 * 3  # tokens of a video of this size
CAPTION = "a red circle moves left"


def assert_same_pixels(video, own):
    """The pixels of a pipeline's video (T, H, W, 3) between 0 and 1, but for roundings that go the other way."""
    wanted = (np.asarray(own) * 255).round().astype(int)
    assert np.abs(video - wanted).max() <= 1 and (video != wanted).mean() < 1e-3


@pytest.fixture(scope="module", params=OTHERS)
def base(request, tmp_path_factory):
    """(family, folder) of a tiny pipeline."""
    folder = tmp_path_factory.mktemp(request.param)
    make_pipeline(request.param).save_pretrained(folder)
    return VIDEO_FAMILIES[request.param], folder


def config_of(dtype="float32", **changes):
    return SamplingConfig(**{"seed": 0, "steps": 3, "guidance": 3.0, "fps": 8, "dtype": dtype, **SIZE, **changes})


@pytest.fixture(scope="module")
def sampler(base):
    return VideoSampler(base[1], config_of(), "cpu")


@pytest.fixture(scope="module")
def video(sampler):
    return sampler.sample(CAPTION, 3, {}, int)


def test_the_video_is_what_the_familys_pipeline_draws_of_the_caption(base, video):
    family, folder = base
    pipe = getattr(diffusers, family.pipeline).from_pretrained(folder)
    options = {"max_sequence_length": COGVIDEOX_TOKENS} if family is COGVIDEOX else {}
    own = pipe(
        CAPTION, num_frames=9, height=32, width=48, num_inference_steps=3, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(3), **options,
    ).frames[0]  # fmt: skip
    assert video.shape == (9, 32, 48, 3) and video.std() > 1
    assert_same_pixels(video, own)


def test_seed_caption_and_guidance_decide_and_steps_are_counted(base, sampler, video):
    steps = []
    assert np.array_equal(video, sampler.sample(CAPTION, 3, {}, lambda: steps.append(1)))
    assert len(steps) == 3
    for caption, seed in ((CAPTION, 4), ("a blue star grows", 3), ("", 3)):
        assert not np.array_equal(video, sampler.sample(caption, seed, {}, int))
    plain = VideoSampler(base[1], config_of(guidance=1.0), "cpu").sample(CAPTION, 3, {}, int)
    assert not np.array_equal(video, plain)


def test_masking_inside_the_pipeline_is_masking_by_definition(base, sampler, video):
    family, _ = base
    layer, ratio, calls = 1, 0.6, []

    def attend(q, k, v, call):
        out = bottom_masked(ratio)(q, k, v, call)
        calls.append((q, k, v, call, out))
        return out

    masked = sampler.sample(CAPTION, 3, {layer: attend}, int)
    assert not np.array_equal(masked, video)
    assert psnr_and_ssim(sampler.sample(CAPTION, 3, {layer: bottom_masked(0.0)}, int), video)[0] > 50
    assert np.array_equal(sampler.sample(CAPTION, 3, {}, int), video)  # masking came off
    # Wan calls the model twice a step, CogVideoX once with both, HunyuanVideo has no empty caption.
    assert [len(q) for q, *_ in calls] == {"wan": [1] * 6, "cogvideox": [2] * 3, "hunyuan_video": [1] * 3}[family.name]
    q, k, v, call, out = calls[-1]
    assert call.layer == layer and call.layout.num_vision == VISION
    text = {"wan": 0, "cogvideox": COGVIDEOX_TOKENS}.get(family.name)
    if family is HUNYUAN_VIDEO:
        text = int(sampler.pipe.encode_prompt(CAPTION)[2].sum())
        assert 0 < text < 256 and q.shape[2] == VISION + 256
    assert call.layout.text_lengths == (text,) * len(q)
    for row in range(len(q)):
        q_row, k_row, v_row = (x[row : row + 1, :, : VISION + text] for x in (q, k, v))
        weights = reference.attention_weights(q_row, k_row)
        ordered = weights.flatten(2).sort(dim=-1).values
        at = reference.rank(ratio, ordered.shape[-1])
        kept = weights >= ((ordered[..., at - 1] + ordered[..., at]) / 2)[..., None, None]
        kept |= weights == weights.amax(dim=-1, keepdim=True)
        assert 0.5 < 1 - kept.double().mean() <= ratio
        wanted = (weights * kept / (weights * kept).sum(dim=-1, keepdim=True)) @ v_row.double()
        torch.testing.assert_close(out[row : row + 1, :, : VISION + text].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(TINY))
@torch.no_grad()
def test_a_masked_layer_does_the_same_in_diffusers_forward_and_in_training(name):
    """A batch of two captions of two lengths, as guidance makes them."""
    split_model = split_model_of(make(name))
    given = inputs(split_model.transformer, (4, 1), pad=2)
    with split_model.attention(dict.fromkeys((1, 3), bottom_masked(0.7))):
        trained, sampled = split_model(**given), stock_forward(split_model, **given)
    torch.testing.assert_close(sampled, trained, rtol=1e-4, atol=1e-5)
    assert (trained - split_model(**given)).norm() > 1e-3 * trained.norm()


def test_latents_and_steps_are_float32_whatever_the_weights(base, video):
    family, folder = base
    narrow = VideoSampler(folder, config_of("bfloat16", guidance=3.01), "cpu")
    pipe, seen, guidance, timesteps = narrow.pipe, set(), [], set()
    step, forward = pipe.scheduler.step, pipe.transformer.forward

    def recorded_step(prediction, *others, **options):
        stepped = step(prediction, *others, **options)
        samples = [x for x in (*others, stepped[0]) if isinstance(x, torch.Tensor) and x.ndim == 5]
        seen.update(x.dtype for x in (prediction, *samples))
        assert len(samples) == 2
        return stepped

    def recorded_forward(**arguments):
        timesteps.add(arguments["timestep"].dtype)
        return forward(**arguments)

    pipe.scheduler.step, pipe.transformer.forward = recorded_step, recorded_forward
    if family is HUNYUAN_VIDEO:
        embed = pipe.transformer.time_text_embed
        embed.register_forward_pre_hook(lambda module, given: guidance.append(float(given[2])))
    drawn = narrow.sample(CAPTION, 3, {}, int)
    assert seen == {torch.float32}
    assert timesteps == {torch.float32 if family is HUNYUAN_VIDEO else torch.int64}
    assert pipe.text_encoder.dtype == pipe.transformer.dtype == torch.bfloat16
    assert pipe.vae.dtype == (torch.float32 if family.name == "wan" else torch.bfloat16)
    if family is HUNYUAN_VIDEO:
        assert guidance == [pytest.approx(3010.0)] * 3  # 3.01 in bfloat16 is 3.016
    assert psnr_and_ssim(drawn, video)[0] > 25


def test_a_hunyuan_video_without_guidance_as_an_input_is_guided_against_the_empty_caption(tmp_path):
    pipe = make_pipeline("hunyuan_video")
    pipe.transformer = make("hunyuan", in_channels=16, out_channels=16, guidance_embeds=False)
    pipe.save_pretrained(tmp_path)
    sampler = VideoSampler(tmp_path, config_of(), "cpu")
    own = pipe(
        CAPTION, negative_prompt="", true_cfg_scale=3.0, num_frames=9, height=32, width=48, num_inference_steps=3,
        output_type="np", generator=torch.Generator().manual_seed(3),
    ).frames[0]  # fmt: skip
    assert_same_pixels(sampler.sample(CAPTION, 3, {}, int), own)


# -- what is refused ---------------------------------------------------------------------------------------------------


def edited(folder, to, part="model_index.json", **changes):
    """A copy of a pipeline folder with other fields in one of its JSON files."""
    copy = shutil.copytree(folder, to)
    path = copy / part
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return copy


@pytest.fixture
def nothing_loaded(monkeypatch):
    def load(*args, **options):
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", load)


@pytest.mark.usefixtures("nothing_loaded")
def test_sizes_are_checked_for_the_family_before_anything_is_loaded(base, tmp_path):
    family, folder = base
    wrong = 13 if family is COGVIDEOX else 10
    fault = rf"with a base of {family.title}: got frames {wrong}, expected {family.frame_step} k \+ 1 .*; got height 24"
    with pytest.raises(ValueError, match=fault):
        sample(tmp_path / "out", base=folder, frames=wrong, height=24)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("nothing_loaded")
def test_a_folder_that_lacks_a_part_is_refused_by_name(base, tmp_path):
    family, folder = base
    for number, part in enumerate([*family.text_encoders, *family.tokenizers, "vae", "scheduler", "transformer"]):
        copy = shutil.copytree(folder, tmp_path / str(number))
        shutil.rmtree(copy / part)
        with pytest.raises(ValueError, match=rf"lacks {part}, which its model_index.json names; .* of {family.title}"):
            sample(tmp_path / "out", base=copy)
    copy = shutil.copytree(folder, tmp_path / "weights")
    (copy / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"text_encoder lacks model\.safetensors"):
        check_pipeline(copy)


@pytest.mark.usefixtures("nothing_loaded")
def test_another_pipeline_and_another_version_of_a_family_are_refused(base, tmp_path):
    family, folder = base
    other = edited(folder, tmp_path / "other", _class_name="LTXPipeline")
    accepted = " or ".join(f"'{known.pipeline}'" for known in VIDEO_FAMILIES.values())
    for call in (pipeline_use, lambda path: sample(tmp_path / "out", base=path)):
        with pytest.raises(ValueError, match=rf"describes 'LTXPipeline', expected {accepted}"):
            call(other)
    part, changes, fault = {
        "wan": ("model_index.json", {"boundary_ratio": 0.9}, r"Wan 2\.2, which is not supported"),
        "cogvideox": ("vae/config.json", {"invert_scale_latents": True}, r"CogVideoX 1\.5, which is not supported"),
        "hunyuan_video": ("transformer/config.json", {"image_condition_type": "latent_concat"}, "of text to video"),
    }[family.name]
    with pytest.raises(ValueError, match=fault):
        check_pipeline(edited(folder, tmp_path / "version", part, **changes))


@pytest.mark.usefixtures("nothing_loaded")
def test_base_and_retrained_model_are_of_one_family(base, pipelines, tmp_path):
    family, folder = base
    with pytest.raises(ValueError, match=f"got a base of {family.title} and a retrained model of {MOCHI.title}"):
        sample(tmp_path / "out", base=folder, retrained=pipelines[1])
