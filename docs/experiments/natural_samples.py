"""Masked generation of docs/experiments/natural-defects.md: how far samples with masked attention are from dense ones.

    python docs/experiments/natural_samples.py OUT LAYERS NAME=FOLDER [NAME=FOLDER ...] [cpu | cuda]

OUT is a folder to write; LAYERS are those that are masked, as in 0-15. Each caption is sampled dense, with each of
`RATIOS` of the weights removed, and dense from another seed. OUT/samples.json has PSNR and SSIM of each video to the
dense one of the same model, and to the dense one of the first model; OUT/NAME.png shows the first four captions.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np

from data.synth.layered import choose_layered_scene
from launch.sample.contact_sheet import write_contact_sheet
from launch.sample.generate import Pixels, SamplingConfig, VideoSampler, bottom_masked, psnr_and_ssim

RATIOS = (0.5, 0.7, 0.9)
CAPTIONS = 16
_SCENES_SEED = 3  # neither that of the training clips nor that of the held-out ones
_OTHER = 1000
_SHOWN = 4
CONFIG = SamplingConfig(
    seed=0, steps=32, guidance=3.0, frames=43, height=128, width=128, fps=12, dtype="bfloat16"
)  # fmt: skip


def videos_of(sampler: VideoSampler, caption: str, seed: int, layers: range) -> dict[str, Pixels]:
    """Name of the variant -> video."""

    def video(noise: int, ratio: float = 0.0) -> Pixels:
        functions = dict.fromkeys(layers, bottom_masked(ratio)) if ratio else {}
        return sampler.sample(caption, noise, functions, lambda: None)

    masked = {f"masked {ratio:g}": video(seed, ratio) for ratio in RATIOS}
    return {"dense": video(seed), **masked, "another seed": video(seed + _OTHER)}


def main(out: Path, layers: range, models: dict[str, Path], device: str, config: SamplingConfig = CONFIG) -> None:
    """Samples every model, and writes what the head of this file says."""
    captions = [choose_layered_scene(_SCENES_SEED, index).caption for index in range(CAPTIONS)]
    first: list[Pixels] = []
    rows: list[dict] = []
    for name, folder in models.items():
        sampler, started = VideoSampler(folder, config, device), time.monotonic()
        sampled = [videos_of(sampler, caption, seed, layers) for seed, caption in enumerate(captions)]
        first = first or [videos["dense"] for videos in sampled]
        for seed, (videos, reference) in enumerate(zip(sampled, first, strict=True)):
            for variant, video in videos.items():
                to_dense, to_first = psnr_and_ssim(video, videos["dense"]), psnr_and_ssim(video, reference)
                rows.append({
                    "model": name, "seed": seed, "variant": variant, "psnr_to_dense": to_dense[0],
                    "ssim_to_dense": to_dense[1], "psnr_to_first": to_first[0], "ssim_to_first": to_first[1],
                })  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        (out / "samples.json").write_text(json.dumps(rows, separators=(",", ":")))
        shown = {variant: [videos[variant] for videos in sampled[:_SHOWN]] for variant in sampled[0]}
        notes = {
            variant: [f"PSNR {row['psnr_to_dense']:.1f} dB to the dense video" if variant != "dense" else ""
                      for row in rows if row["model"] == name and row["variant"] == variant]
            for variant in shown
        }  # fmt: skip
        write_contact_sheet(out / f"{name}.png", captions[:_SHOWN], shown, notes)
        means = {
            v: np.mean([r["psnr_to_dense"] for r in rows if (r["model"], r["variant"]) == (name, v)]) for v in shown
        }
        print(f"{name}: {time.monotonic() - started:.0f} s, mean PSNR to dense {means}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(f"error: got {sys.argv[1:]}, expected: OUT LAYERS NAME=FOLDER ... [cpu | cuda]")
    words = sys.argv[3:]
    where = words.pop() if words[-1] in ("cpu", "cuda") else "cuda"
    low, high = sys.argv[2].split("-")
    pairs = (word.partition("=") for word in words)
    main(Path(sys.argv[1]), range(int(low), int(high) + 1), {name: Path(path) for name, _, path in pairs}, where)
