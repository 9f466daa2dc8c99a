"""`reblock sample`: samples the same captions and seeds from base and retrained model, each also masked."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from data.base_folder import resolve_base
from data.families import VideoFamily
from data.files import write_json
from data.video.decode import decode_video
from data.video.write import write_video
from launch.sample.contact_sheet import write_contact_sheet
from launch.sample.generate import SamplingConfig, VideoSampler, bottom_masked, psnr_and_ssim
from launch.sample.pipelines import check_pipeline
from launch.sample.variants import (
    BASE,
    BASE_MASKED,
    OTHER_SEED,
    RETRAINED,
    RETRAINED_MASKED,
    sample_note,
)
from trainer.models.layout import AttentionFunction

#: Default captions, in the language of `reblock synth`.
CAPTIONS = (
    "a red circle moves right over a dark gray background",
    "a yellow star moves down over a dark blue background",
    "a purple square moves left over a light green background",
)


#: Added to a caption's seed for the other seed.
_NEXT_SEED = 1000


@dataclass(frozen=True)
class SampleVariant:
    """One way to sample a caption.

    Args:
        name: base, base-masked, base-other-seed, retrained or retrained-masked.
        folder: pipeline folder to sample from.
        mask_ratio: share of attention weights removed in the layers of `functions`.
        functions: attention function by layer; empty for dense attention.
    """

    name: str
    folder: Path
    mask_ratio: float = 0.0
    functions: Mapping[int, AttentionFunction] = field(default_factory=dict)

    def noise_seed(self, seed: int) -> int:
        """Seed of the variant's noise for a caption's seed."""
        return seed + _NEXT_SEED if self.name == OTHER_SEED else seed


def _retrained_blocks(folder: Path) -> list[int]:
    path = folder / "reblock.json"
    blocks = json.loads(path.read_text()).get("blocks") if path.is_file() else None
    if not blocks:
        raise ValueError(
            f"{path} does not name the retrained blocks, so there is nothing to mask; expected a folder written by "
            "`reblock export`, or mask_ratio 0."
        )
    return [int(block) for block in blocks]


def _identity(folder: Path) -> str:
    """Sizes and modification times of a pipeline folder's weights, which change if the weights are written again."""
    files = sorted(folder.glob("*/*.safetensors"))
    return " ".join(f"{f.parent.name}/{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)


def _read_entries(path: Path) -> list[dict]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def _variants(base: Path, family: VideoFamily, retrained: Path | None, mask_ratio: float) -> list[SampleVariant]:
    if not 0.0 <= mask_ratio < 1.0 or (mask_ratio and retrained is None):
        raise ValueError(f"got mask_ratio {mask_ratio}, expected 0 <= ratio < 1, and a retrained folder if above 0.")
    if retrained is None:
        return [SampleVariant(BASE, base), SampleVariant(OTHER_SEED, base)]
    folder = resolve_base(str(retrained))
    own = check_pipeline(folder).family
    if own is not family:
        raise ValueError(f"got a base of {family.title} and a retrained model of {own.title}, expected one family.")
    functions = dict.fromkeys(_retrained_blocks(folder), bottom_masked(mask_ratio)) if mask_ratio else {}
    masked = [SampleVariant(BASE_MASKED, base, mask_ratio, functions)] if mask_ratio else []
    retrained_masked = [SampleVariant(RETRAINED_MASKED, folder, mask_ratio, functions)] if mask_ratio else []
    return [
        SampleVariant(BASE, base), *masked, SampleVariant(OTHER_SEED, base),
        SampleVariant(RETRAINED, folder), *retrained_masked,
    ]  # fmt: skip


def sample(
    out: Path,
    *,
    base: Path,
    retrained: Path | None = None,
    captions: list[str] | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    mask_ratio: float = 0.0,
    frames: int | None = None,
    height: int = 64,
    width: int = 64,
    fps: int = 12,
    device: str = "cpu",
    dtype: str = "float32",
) -> None:
    """Samples the same captions and seeds from base and retrained model, and draws a contact sheet of all videos.

    Each family (Mochi, Wan 2.1, HunyuanVideo, CogVideoX) is sampled by its own diffusers pipeline and scheduler.
    Writes one mp4 per caption and variant (base, base-masked, base-other-seed, retrained, retrained-masked),
    samples.json and contact-sheet.png. Masked videos are compared with the same model's dense ones; the base's other
    seed and the retrained model with the base: two seeds differ by as much as one caption leaves open. Videos that
    exist with the same settings are not sampled again.

    Args:
        out: folder to write the videos to.
        base: diffusers pipeline folder of the base.
        retrained: pipeline folder written by `reblock export`; without it only the base is sampled.
        captions: texts to sample; three captions of the synthetic clips by default.
        seed: seed of the first caption's noise; caption i uses seed + i in every variant.
        steps: number of denoising steps; by default 32, for CogVideoX 40 (best a divisor of 1000).
        guidance: scale of classifier-free guidance against the empty caption, 1 turns it off; for HunyuanVideo the
            guidance that is an input of the model. By default 4.5 for Mochi, 5 for Wan 2.1, 6 for the others.
        mask_ratio: share of the attention weights removed in the retrained blocks, smallest first; 0 leaves the masked
            variants out. Of Wan 2.1 self-attention is masked, cross-attention is not.
        frames: number of frames per video: 6k + 1 for Mochi (19 by default), 4k + 1 for Wan 2.1 and HunyuanVideo,
            8k + 1 for CogVideoX (17 by default).
        height: height in pixels, a multiple of 16.
        width: width in pixels, a multiple of 16.
        fps: frames per second of the files.
        device: torch device to sample on.
        dtype: dtype of the weights, float32 or bfloat16; latents stay float32 between steps.
    """
    folder = resolve_base(str(base))
    use = check_pipeline(folder)
    config = SamplingConfig(
        seed=seed,
        steps=use.steps if steps is None else steps,
        guidance=use.guidance if guidance is None else guidance,
        frames=use.frames if frames is None else frames,
        height=height,
        width=width,
        fps=fps,
        dtype=dtype,
    )
    config.check(use.family)
    variants = _variants(folder, use.family, retrained, mask_ratio)
    texts = list(CAPTIONS) if captions is None else captions
    if not texts:
        raise ValueError("got no captions, expected at least one; leave the option out for the default ones.")
    out.mkdir(parents=True, exist_ok=True)

    done = {entry["file"]: entry for entry in _read_entries(out / "samples.json") if (out / entry["file"]).is_file()}
    entries: list[dict] = []
    for (i, text), variant in itertools.product(enumerate(texts), variants):
        settings = asdict(config) | {"mask_ratio": variant.mask_ratio, "model": _identity(variant.folder)}
        entry = {"caption": text, "seed": seed + i, "variant": variant.name, "file": f"{i:02d}-{variant.name}.mp4"}
        entry |= {"settings": settings, "noise_seed": variant.noise_seed(seed + i)}
        old = done.get(entry["file"], {})
        entries.append(old if entry.items() <= old.items() else entry)
    kept = sum("frames" in entry for entry in entries)
    if kept:
        print(f"{out}: {kept} of {len(entries)} videos exist with these settings and are kept")
    _sample_missing(out, entries, variants, config, device)

    videos = {v.name: [decode_video(out / e["file"]) for e in entries if e["variant"] == v.name] for v in variants}
    notes = {v.name: [sample_note(e) for e in entries if e["variant"] == v.name] for v in variants}
    write_contact_sheet(out / "contact-sheet.png", texts, videos, notes)
    print(f"{out / 'contact-sheet.png'}: {len(texts)} captions, each as {', '.join(videos)}")


def _sample_missing(
    out: Path, entries: list[dict], variants: Sequence[SampleVariant], config: SamplingConfig, device: str
) -> None:
    """Samples the entries without `frames`, one model after the other, since at real size only one fits into memory."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    by_folder = [(f, list(group)) for f, group in itertools.groupby(variants, key=lambda v: v.folder)]
    with Progress(*columns) as progress:
        task = progress.add_task("denoising steps", total=0)
        for folder, group in by_folder:
            names = [v.name for v in group]
            own = [e for e in entries if e["variant"] in names]
            # Both are sampled, since a masked video is compared with the pixels of the dense one.
            seeds = {e["seed"] for e in own if "frames" not in e}
            todo = [e for e in own if e["seed"] in seeds]
            if todo:
                progress.update(task, total=(progress.tasks[0].total or 0) + len(todo) * config.steps)
                sampler = VideoSampler(folder, config, device)
                _sample_entries(out, entries, todo, {v.name: v for v in group}, sampler, progress, task)


def _sample_entries(
    out: Path,
    entries: list[dict],
    todo: list[dict],
    variants: Mapping[str, SampleVariant],
    sampler: VideoSampler,
    progress: Progress,
    task: TaskID,
) -> None:
    """Samples and writes the videos of `todo`, and adds the results to its entries; `entries` is the whole index."""
    dense = None
    for entry in todo:
        variant = variants[entry["variant"]]
        progress.update(task, description=f"{variant.name}, seed {entry['seed']}")
        video = sampler.sample(entry["caption"], entry["noise_seed"], variant.functions, lambda: progress.advance(task))
        write_video(out / entry["file"], video, sampler.config.fps)
        to_dense: tuple[float | None, float | None] = (None, None)
        to_base = to_dense
        if variant.functions and dense is not None:
            to_dense = psnr_and_ssim(video, dense)
        elif variant.name in (OTHER_SEED, RETRAINED):  # both against the file: the base may have been sampled before
            of_base = next(e["file"] for e in entries if (e["variant"], e["seed"]) == (BASE, entry["seed"]))
            to_base = psnr_and_ssim(video, decode_video(out / of_base))
        if variant.name in (BASE, RETRAINED):
            dense = video
        entry |= {
            "frames": len(video),
            "fps": sampler.config.fps,
            "psnr_to_dense": to_dense[0],
            "ssim_to_dense": to_dense[1],
            "psnr_to_base": to_base[0],
            "ssim_to_base": to_base[1],
        }
        write_json(out / "samples.json", [e for e in entries if "frames" in e])
