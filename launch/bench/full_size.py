"""`reblock bench full`: times a few real training steps of a full-size model with random weights."""

import resource
import time
from math import prod
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from data.batch import Batch, Sample
from launch.bench.result import BenchResult, choose_device
from trainer.models.load import read_config, read_facts
from trainer.module import RetrainBlocks, SurgeryConfig

_GIB = 2**30
_RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def latent_shape(channels: int, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Shape (C, F, H, W) of the latent of a clip.

    Raises:
        ValueError: if Mochi's VAE and patches do not support the clip's size.
    """
    if frames < 1 or frames % 6 != 1 or height % 16 or width % 16 or height < 16 or width < 16:
        raise ValueError(
            f"got a clip of {frames} frames at {height} x {width}, expected 6k + 1 frames and multiples of 16."
        )
    return channels, (frames - 1) // 6 + 1, height // 8, width // 8


def random_batch(shape: tuple[int, ...], text_tokens: int, text_width: int, uid: int) -> Batch:
    """A batch with one sample, whose latent and caption embedding are noise."""
    generator = torch.Generator().manual_seed(uid)
    latent = torch.randn(shape, generator=generator)
    text = torch.randn(text_tokens, text_width, generator=generator)
    return Batch.collate([Sample(latent=latent, text=text, key=f"random-{uid}", uid=uid)])


class StepClock(Callback):
    """Measures seconds of each step, and peak memory in GiB of each latent shape."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[int, ...], list[float]] = {}
        self.peak: dict[tuple[int, ...], float] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        shape = tuple(batch.latents.shape[1:])
        if shape not in self.seconds and pl_module.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.seconds.setdefault(shape, [])
        self._start = _now(pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        shape = tuple(batch.latents.shape[1:])
        self.seconds[shape].append(_now(pl_module.device) - self._start)
        self.peak[shape] = _peak_gib(pl_module.device)
        loss = float(trainer.callback_metrics["train/loss"])
        print(f"latent {shape}: step {self.seconds[shape][-1]:.3f} s, loss {loss:.4f}", flush=True)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _GIB  # kilobytes on Linux


def run(
    *,
    device: str = "auto",
    config_json: Path = _RECIPES / "mochi1_transformer.json",
    frames: tuple[int, ...] = (37, 163),
    height: int = 480,
    width: int = 848,
    text_tokens: int = 256,
    steps: int = 5,
    last: int = 4,
) -> BenchResult:
    """Builds a full-size model with random weights and trains it for some steps at each clip length.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        config_json: JSON file with the transformer's config.
        frames: clip lengths in frames, each 6k + 1.
        height: height of the clips in pixels, a multiple of 16.
        width: width of the clips in pixels, a multiple of 16.
        text_tokens: number of tokens of a caption.
        steps: number of training steps at each clip length.
        last: number of last blocks to retrain.
    """
    device = choose_device(device)
    facts = read_facts(read_config(str(config_json)))
    shapes = [latent_shape(facts.channels, count, height, width) for count in frames]
    module = RetrainBlocks(
        base=str(config_json),
        surgery=SurgeryConfig(last=last),
        trunk_dtype="bfloat16",
        checkpoint_head=True,
        caption_dropout=0.0,
    )
    batches = [random_batch(shape, text_tokens, facts.text_width, uid) for shape in shapes for uid in range(steps)]
    clock = StepClock()
    trainer = Trainer(
        accelerator="gpu" if device.startswith("cuda") else device, devices=1,
        precision="bf16-mixed", max_steps=len(batches), logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[clock],
    )  # fmt: skip
    start = time.perf_counter()
    print(f"building {facts.num_blocks} blocks with random weights on {device}", flush=True)
    module.build(trainer.strategy.root_device)
    print(f"built in {time.perf_counter() - start:.0f} s", flush=True)
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type] # a list works as a data set
    rows = []
    for count, shape in zip(frames, shapes, strict=True):
        seconds = clock.seconds[shape]
        tokens = shape[1] * shape[2] * shape[3] // prod(facts.patch)
        rows.append([
            str(count), f"{tokens:,} + {text_tokens}", f"{min(seconds[1:] or seconds):.3f}",
            " ".join(f"{s:.3f}" for s in seconds), f"{clock.peak[shape]:.1f}",
        ])  # fmt: skip
    every = sum(p.numel() for p in module.split_model.transformer.parameters())
    retrained = sum(p.numel() for p in module.retrained_parameters().values())
    return BenchResult(
        title=f"Training step, {facts.num_blocks} blocks, last {last} retrained, {height} x {width}, batch 1",
        columns=("frames", "tokens (vision + text)", "best s/step", "each step (s)", "peak memory (GiB)"),
        rows=rows,
        notes=(
            f"{every / 1e6:,.1f} M parameters, {retrained / 1e6:,.1f} M retrained in float32; trunk bfloat16, "
            "bf16-mixed, AdamW, EMA, head checkpointed, random weights. "
            "The first step at each length holds one-time work.",
        ),
        device=device,
    )
