"""`reblock bench full`: times a few real training steps of a full-size model with random weights."""

import resource
import time
from math import prod
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from data.batch import Batch, Sample
from data.bucket import Bucket
from data.families import family_titled
from launch.bench.result import BenchResult, choose_device
from trainer.models.facts import ModelFacts
from trainer.models.load import read_config, read_facts
from trainer.module import RetrainBlocks, SurgeryConfig

_GIB = 2**30
_RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def random_batch(shape: tuple[int, ...], text_tokens: int, facts: ModelFacts, uid: int) -> Batch:
    """A batch with one sample, whose latent (C, F, H, W) and caption embeddings are noise."""
    generator = torch.Generator().manual_seed(uid)
    latent = torch.randn(shape, generator=generator)
    text = torch.randn(text_tokens, facts.text_width, generator=generator)
    pooled = None if facts.pooled_width is None else torch.randn(facts.pooled_width, generator=generator)
    return Batch.collate([Sample(latent=latent, text=text, key=f"random-{uid}", uid=uid, pooled=pooled)])


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
    config_json: Path = _RECIPES / "transformers" / "mochi_1.json",
    frames: tuple[int, ...] = (37, 163),
    height: int = 480,
    width: int = 848,
    text_tokens: int | None = None,
    steps: int = 5,
    last: int = 4,
) -> BenchResult:
    """Builds a full-size model with random weights and trains it for some steps at each clip length.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        config_json: JSON file with the transformer's config, of any family.
        frames: clip lengths in frames, as the family's VAE takes them: 6k + 1 for Mochi.
        height: height of the clips in pixels, a multiple of 16.
        width: width of the clips in pixels, a multiple of 16.
        text_tokens: number of tokens of a caption; the family's longest by default.
        steps: number of training steps at each clip length.
        last: number of last blocks to retrain.
    """
    device = choose_device(device)
    facts = read_facts(read_config(str(config_json)))
    family = family_titled(facts.family).name
    shapes = [Bucket(count, height, width, family).latent_shape(facts.channels) for count in frames]
    text_tokens = facts.longest_caption if text_tokens is None else text_tokens
    module = RetrainBlocks(
        base=str(config_json),
        surgery=SurgeryConfig(last=last),
        trunk_dtype="bfloat16",
        checkpoint_head=True,
        caption_dropout=0.0,
    )
    batches = [random_batch(shape, text_tokens, facts, uid) for shape in shapes for uid in range(steps)]
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
        title=f"Training step of {config_json.stem}, {facts.num_blocks} blocks, last {last} retrained, "
        f"{height} x {width}, batch 1",
        columns=("frames", "tokens (vision + text)", "best s/step", "each step (s)", "peak memory (GiB)"),
        rows=rows,
        notes=(
            f"{every / 1e6:,.1f} M parameters, {retrained / 1e6:,.1f} M retrained in float32; trunk bfloat16, "
            "bf16-mixed, AdamW, EMA, head checkpointed, random weights. "
            "The first step at each length holds one-time work.",
        ),
        device=device,
    )
