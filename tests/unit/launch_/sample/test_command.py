"""`reblock sample`: variants, seeds, which videos are not sampled again, what is refused."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline

from data.video.decode import decode_video
from launch.sample.command import sample
from launch.sample.generate import SamplingConfig, VideoSampler, psnr_and_ssim

SMALL = {"steps": 3, "frames": 7, "height": 16, "width": 64}
CAPTIONS = ["a red circle moves left", "a blue star grows"]


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
        for variant in ("base", "base-masked", "base-other-seed", "retrained", "retrained-masked")
    ]
    for entry in entries:
        assert decode_video(drawn / entry["file"]).shape == (7, 16, 64, 3)
        assert (entry["frames"], entry["fps"]) == (7, 12)
        for reference, variants in (
            ("dense", ("base-masked", "retrained-masked")),
            ("base", ("base-other-seed", "retrained")),
        ):
            compared = entry["variant"] in variants
            for figure in ("psnr", "ssim"):
                assert (entry[f"{figure}_to_{reference}"] is not None) == compared, (
                    entry["variant"],
                    figure,
                    reference,
                )
        assert entry["noise_seed"] - entry["seed"] == (1000 if entry["variant"] == "base-other-seed" else 0)
    assert (drawn / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_samples_nothing_and_other_settings_sample_anew(drawn: Path, pipelines, capsys, monkeypatch):
    base, retrained = pipelines
    before = {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.mp4")}
    sampled = []
    real = VideoSampler.sample

    def sample_once(self, caption, seed, functions, on_step):
        sampled.append((caption, bool(functions), seed))
        return real(self, caption, seed, functions, on_step)

    monkeypatch.setattr(VideoSampler, "sample", sample_once)
    call = {"base": base, "retrained": retrained, "captions": CAPTIONS, "seed": 5, **SMALL}
    sample(drawn, mask_ratio=0.9, **call)
    assert "10 of 10 videos exist" in capsys.readouterr().out
    assert sampled == []
    assert {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.mp4")} == before
    # Another ratio needs the dense pixels again.
    sample(drawn, mask_ratio=0.5, **call)
    base_row = [(CAPTIONS[0], False, 5), (CAPTIONS[0], True, 5), (CAPTIONS[0], False, 1005)]
    base_row += [(CAPTIONS[1], False, 6), (CAPTIONS[1], True, 6), (CAPTIONS[1], False, 1006)]
    retrained_row = [(CAPTIONS[i], masked, 5 + i) for i in range(2) for masked in (False, True)]
    assert sampled == base_row + retrained_row


def test_another_seed_and_the_retrained_model_are_compared_with_the_bases_file(drawn: Path, pipelines):
    entries = {(e["variant"], e["seed"]): e for e in json.loads((drawn / "samples.json").read_text())}
    config = SamplingConfig(seed=5, guidance=4.5, fps=12, dtype="float32", **SMALL)
    for folder, variant, noise_seed in zip(pipelines, ("base-other-seed", "retrained"), (1005, 5), strict=True):
        video = VideoSampler(folder, config, "cpu").sample(CAPTIONS[0], noise_seed, {}, lambda: None)
        expected = psnr_and_ssim(video, decode_video(drawn / entries["base", 5]["file"]))
        found = [entries[variant, 5][f"{figure}_to_base"] for figure in ("psnr", "ssim")]
        assert found == pytest.approx(expected, rel=1e-6), variant


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": 8}, r"with a base of Mochi: got frames 8, expected 6 k \+ 1"),
        ({"height": 24}, "multiple of 16"),
        ({"dtype": "float16"}, "'bfloat16'"),
        ({"frames": 8, "steps": 0}, "frames 8, .*; got steps 0"),
        ({"mask_ratio": 0.5}, "retrained folder"),
        ({"mask_ratio": 1.0}, "ratio < 1"),
        ({"base": Path("nowhere")}, "does not exist"),
    ],
)
def test_faults_are_named_before_anything_is_loaded(tmp_path: Path, pipelines, change: dict, message: str, monkeypatch):
    monkeypatch.delattr(DiffusionPipeline, "from_pretrained")
    with pytest.raises(ValueError, match=message):
        sample(tmp_path / "out", **{"base": pipelines[0], **SMALL, **change})
    assert not (tmp_path / "out").exists()


def test_masking_needs_to_know_the_retrained_blocks(tmp_path: Path, pipelines):
    with pytest.raises(ValueError, match="does not name the retrained blocks"):
        sample(tmp_path / "out", base=pipelines[0], retrained=pipelines[0], mask_ratio=0.5, **SMALL)


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"model_index\.json"):
        sample(tmp_path / "out", base=tmp_path, **SMALL)
