"""Masked generation of docs/experiments/natural-defects.md: how far samples with masked attention are from dense ones.

    python docs/experiments/natural_samples.py sample OUT LAYERS RATIOS PART/PARTS NAME=FOLDER [NAME=FOLDER ...]
    python docs/experiments/natural_samples.py table OUT [OUT ...]   (folders, or files of their rows)
    python docs/experiments/natural_samples.py figure OUT NAME PNG

Each caption is sampled dense, with each of RATIOS (as in 0.5,0.7) of the smallest weights removed in LAYERS (as in
0-15), and dense from another seed. A process samples captions PART, PART + PARTS, ... and writes PSNR and SSIM of each
video to the dense one of the same model, and to the dense one of the first model. DEVICE=cpu samples there.
"""

import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data.inspect.sample_clips import even_indices
from data.synth.layered import choose_layered_scene
from launch.sample.contact_sheet import write_contact_sheet
from launch.sample.generate import Pixels, SamplingConfig, VideoSampler, bottom_masked, psnr_and_ssim

CAPTIONS = 16
CONFIG = SamplingConfig(seed=0, steps=32, guidance=3.0, frames=43, height=128, width=128, fps=12, dtype="bfloat16")
_SCENES_SEED = 3  # neither that of the training clips nor that of the held-out ones
_OTHER = 1000  # added to a caption's seed for the other seed
_SHOWN = 4  # captions, and frames of each video, in the figure
_DRAWS = 2000


def captions() -> list[str]:
    """The captions, of scenes that no training or held-out clip shows."""
    return [choose_layered_scene(_SCENES_SEED, index).caption for index in range(CAPTIONS)]


def sample(
    out: Path, layers: range, ratios: Sequence[float], part: int, parts: int, models: dict[str, Path], device: str
) -> None:
    """Samples this part's captions with every model."""
    samplers = {name: VideoSampler(folder, CONFIG, device) for name, folder in models.items()}
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict] = []
    for seed, caption in list(enumerate(captions()))[part::parts]:
        first: Pixels | None = None
        for name, sampler in samplers.items():
            variants = {"dense": (seed, 0.0), "another seed": (seed + _OTHER, 0.0)}
            variants |= {f"masked {ratio:g}": (seed, ratio) for ratio in ratios}
            dense: Pixels | None = None
            for variant, (noise, ratio) in variants.items():
                functions = dict.fromkeys(layers, bottom_masked(ratio)) if ratio else {}
                video = sampler.sample(caption, noise, functions, lambda: None)
                dense = video if dense is None else dense
                first = video if first is None else first
                to_dense, to_first = psnr_and_ssim(video, dense), psnr_and_ssim(video, first)
                rows.append({"model": name, "seed": seed, "variant": variant, "psnr": to_dense[0], "ssim": to_dense[1],
                             "psnr_to_first": to_first[0], "ssim_to_first": to_first[1]})  # fmt: skip
                if seed < _SHOWN:
                    np.save(out / f"{name}-{seed}-{variant.replace(' ', '-')}.npy", video[even_indices(len(video), 4)])
                (out / f"samples-{part}.json").write_text(json.dumps(rows, separators=(",", ":")))


def read(out: Path) -> list[dict]:
    """The rows of all parts in a folder, or of one file."""
    paths = sorted(out.glob("samples-*.json")) if out.is_dir() else [out]
    return [row for path in paths for row in json.loads(path.read_text())]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean with its 95 % interval: a bootstrap over captions."""
    array = np.array(values)
    drawn = np.random.default_rng(0).integers(len(array), size=(_DRAWS, len(array)))
    low, high = np.quantile(array[drawn].mean(axis=1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def table(rows: Sequence[dict]) -> str:
    """Distances to the dense video of the same model, as Markdown."""
    lines = ["| model | video | captions | PSNR to dense in dB | SSIM to dense |", "|---|---|---|---|---|"]
    names = list(dict.fromkeys(row["model"] for row in rows))
    for name, variant in itertools.product(names, ["masked 0.5", "masked 0.7", "masked 0.9", "another seed"]):
        own = [row for row in rows if (row["model"], row["variant"]) == (name, variant)]
        if own:
            psnr, ssim = (interval([row[key] for row in own]) for key in ("psnr", "ssim"))
            lines.append(
                f"| {name} | {variant} | {len(own)} | {psnr[0]:.1f} ({psnr[1]:.1f} to {psnr[2]:.1f}) | "
                f"{ssim[0]:.3f} ({ssim[1]:.3f} to {ssim[2]:.3f}) |"
            )
    return "\n".join(lines)


def figure(out: Path, name: str, png: Path) -> None:
    """Contact sheet of the first captions of one model."""
    found = {(row["seed"], row["variant"]): row for row in read(out) if row["model"] == name}
    masked = sorted({variant for _, variant in found if variant.startswith("masked")})
    variants = ["dense", *masked, "another seed"]
    seeds = [seed for seed in range(_SHOWN) if all((seed, variant) in found for variant in variants)]
    videos = {v: [np.load(out / f"{name}-{seed}-{v.replace(' ', '-')}.npy") for seed in seeds] for v in variants}
    notes = {
        v: ["" if v == "dense" else f"PSNR {found[seed, v]['psnr']:.1f} dB to dense" for seed in seeds]
        for v in variants
    }
    write_contact_sheet(png, [captions()[seed] for seed in seeds], videos, notes)


def main(words: list[str]) -> None:
    """See the head of this file."""
    match words:
        case ["sample", out, layers, ratios, part, *pairs] if pairs:
            low, high = map(int, layers.split("-"))
            number, parts = map(int, part.split("/"))
            models = {name: Path(path) for name, _, path in (pair.partition("=") for pair in pairs)}
            removed = [float(ratio) for ratio in ratios.split(",")]
            device = os.environ.get("DEVICE", "cuda")
            sample(Path(out), range(low, high + 1), removed, number, parts, models, device)
        case ["table", *outs] if outs:
            print(table([row for out in outs for row in read(Path(out))]))
        case ["figure", out, name, png]:
            figure(Path(out), name, Path(png))
        case _:
            sys.exit(
                f"error: got {words}, expected: sample OUT LAYERS RATIOS PART/PARTS NAME=FOLDER ..., table or figure"
            )


if __name__ == "__main__":
    main(sys.argv[1:])
