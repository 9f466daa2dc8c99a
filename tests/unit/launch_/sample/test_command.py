"""`reblock sample`: variants, seeds, which videos are not sampled again, what is refused."""

import json
from pathlib import Path

import pytest

from data.video.decode import decode_video
from launch.sample.command import sample
from launch.sample.generate import VideoSampler

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
        for variant in ("base", "retrained", "retrained-masked")
    ]
    for entry in entries:
        assert decode_video(drawn / entry["file"]).shape == (7, 16, 64, 3)
        assert (entry["frames"], entry["fps"]) == (7, 12)
        masked = entry["variant"] == "retrained-masked"
        assert (entry["psnr_to_dense"] is not None) == (entry["ssim_to_dense"] is not None) == masked
    assert (drawn / "contact-sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_call_samples_nothing_and_other_settings_sample_anew(drawn: Path, pipelines, capsys, monkeypatch):
    base, retrained = pipelines
    before = {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.mp4")}
    sampled = []
    real = VideoSampler.sample

    def sample_once(self, caption, seed, functions, on_step):
        sampled.append((caption, bool(functions)))
        return real(self, caption, seed, functions, on_step)

    monkeypatch.setattr(VideoSampler, "sample", sample_once)
    call = {"base": base, "retrained": retrained, "captions": CAPTIONS, "seed": 5, **SMALL}
    sample(drawn, mask_ratio=0.9, **call)
    assert "6 of 6 videos exist" in capsys.readouterr().out
    assert sampled == []
    assert {path.name: path.stat().st_mtime_ns for path in drawn.glob("*.mp4")} == before
    # Another ratio needs the dense pixels again, but not the base's.
    sample(drawn, mask_ratio=0.5, **call)
    assert sampled == [(CAPTIONS[0], False), (CAPTIONS[0], True), (CAPTIONS[1], False), (CAPTIONS[1], True)]


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
