"""`reblock bench step`: a training step of trunk and head, against diffusers' own forward and under each objective.

All variants have the same weights, retrained blocks and batch; flow losses are compared before anything is timed.
Steps of the variants are interleaved, so that a busy machine slows all of them alike. The memory that a step adds to
the built model is measured in a new process for each variant.
"""

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.batch import Batch, Sample
from launch.bench.host_memory import host_peak
from launch.bench.result import BenchResult, choose_device
from trainer.distillation import ObjectivePhase
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig

#: Config of the timed model, large enough that matrix products dominate the time on a CPU, and not Python.
CONFIG: dict[str, Any] = {
    "_class_name": "MochiTransformer3DModel",
    "patch_size": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "num_layers": 12,
    "pooled_projection_dim": 128,
    "in_channels": 12,
    "qk_norm": "rms_norm",
    "text_embed_dim": 64,
    "time_embed_dim": 64,
    "activation_fn": "swiglu",
    "max_sequence_length": 32,
}
LATENT = (12, 4, 16, 16)  # (C, F, H, W): 256 vision tokens
CAPTIONS = (32, 20)  # text tokens of each sample
RETRAINED = 4

TRUNK_HEAD = "trunk / head"
STOCK = "diffusers' forward, same freeze"
TRAP = "the same, `pos_frequencies` left trainable"
#: Variant -> its objective. The first three compute the flow loss, each in its own way.
OBJECTIVES = {
    TRUNK_HEAD: ObjectivePhase(flow=1.0),
    STOCK: ObjectivePhase(flow=1.0),
    TRAP: ObjectivePhase(flow=1.0),
    "trunk / head, objective `velocity`": ObjectivePhase(velocity=1.0),
    "trunk / head, objective `blocks`": ObjectivePhase(blocks=1.0),
    "trunk / head, `blocks` and `velocity`": ObjectivePhase(blocks=1.0, velocity=1.0),
}
VARIANTS = tuple(OBJECTIVES)
FLOW_VARIANTS = (TRUNK_HEAD, STOCK, TRAP)


@contextmanager
def config_file(config: dict) -> Iterator[str]:
    """Writes a temporary config.json, as a base with random weights; yields its path."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        yield str(path)


def make_batch(config: dict, latent: tuple[int, ...], captions: tuple[int, ...]) -> Batch:
    """A batch whose latents and caption embeddings are noise."""
    generator = torch.Generator().manual_seed(0)
    return Batch.collate([
        Sample(
            latent=torch.randn(latent, generator=generator),
            text=torch.randn(length, config["text_embed_dim"], generator=generator),
            key=str(uid),
            uid=uid,
        )
        for uid, length in enumerate(captions)
    ])  # fmt: skip


class StepVariant:
    """One implementation of a training step.

    Args:
        name: one of `VARIANTS`.
        base: path of a config.json.
        batch: batch of every step.
        last: number of last blocks to retrain.
        device: torch device to train on.
    """

    def __init__(self, name: str, base: str, batch: Batch, *, last: int, device: str) -> None:
        # Initialised by `torch`, since with `dit` only the gates of a new block have a nonzero gradient at first.
        self.module = RetrainBlocks(
            base=base, surgery=SurgeryConfig(last=last, init="torch"), optim=OptimConfig(warmup_steps=1),
            caption_dropout=0.0, stock_attention=name in (STOCK, TRAP), objective=(OBJECTIVES[name],),
        )  # fmt: skip
        self.module.build(device)
        self.module.to(device)
        self.optimizer = self.module.configure_optimizers()["optimizer"]  # type: ignore[index, call-overload]
        self.batch = batch.to(device)
        flow = self.module.flow
        self.sigma = flow.sigma(0, batch.uids).to(device)
        self.noise = flow.noise(0, batch.uids, batch.latents.shape[1:]).to(device)
        self.phase = OBJECTIVES[name]
        self.loss: Callable[[], Tensor] = self._stock_loss if name in (STOCK, TRAP) else self._loss
        if name == TRAP:
            self.module.split_model.transformer.pos_frequencies.requires_grad_(True)

    def _stock_loss(self) -> Tensor:
        process, batch = self.module.process, self.batch
        x, timestep = process.mix(batch.latents, self.noise, self.sigma), process.timestep(self.sigma)
        velocity = self.module.split_model.transformer(x, batch.text, timestep, batch.text_mask, return_dict=False)[0]
        return (velocity - process.target(batch.latents, self.noise, self.sigma)).square().mean()

    def _loss(self) -> Tensor:
        return self.module.objective_losses(self.batch, self.noise, self.sigma, self.phase).mean()

    def step(self) -> None:
        """Runs one step: forward, backward, clipping, AdamW."""
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(list(self.module.retrained_parameters().values()), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """Runs one step and returns its seconds."""
        _synchronize(self.batch.latents.device)
        start = time.perf_counter()
        self.step()
        _synchronize(self.batch.latents.device)
        return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def saved_bytes(variant: StepVariant) -> int:
    """Bytes that autograd saves for the backward pass, without the weights; each storage counts once."""
    weights = {p.untyped_storage().data_ptr() for p in variant.module.split_model.transformer.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        variant.loss()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def step_memory(name: str, config: dict, latent: tuple, captions: tuple, last: int, device: str, threads: int) -> int:
    """Bytes that the first step adds to the peak memory of this process, with the optimiser state."""
    torch.set_num_threads(threads)
    with config_file(config) as base:
        variant = StepVariant(name, base, make_batch(config, latent, captions), last=last, device=device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.max_memory_allocated()
        variant.step()
        return torch.cuda.max_memory_allocated() - before
    before = host_peak(reset=True)
    variant.step()
    return host_peak() - before


@dataclass
class StepCost:
    """Cost of a variant.

    Args:
        seconds: seconds of each step.
        saved: bytes that autograd saves for the backward pass.
    """

    seconds: list[float]
    saved: int


def compare(
    config: dict, latent: tuple, captions: tuple, *, last: int, device: str, repeats: int
) -> dict[str, StepCost]:
    """Measures the cost of each of `VARIANTS`.

    Raises:
        RuntimeError: if the losses of the variants differ, since they then do different work.
    """
    with config_file(config) as base:
        batch = make_batch(config, latent, captions)
        variants = {name: StepVariant(name, base, batch, last=last, device=device) for name in VARIANTS}
    losses = {name: float(variants[name].loss().detach()) for name in FLOW_VARIANTS}
    if max(losses.values()) - min(losses.values()) > 1e-4 * max(losses.values()):
        raise RuntimeError(f"the variants give different losses: {losses}")
    kept = {name: saved_bytes(variant) for name, variant in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for variant in variants.values():
        variant.step()  # allocations and the optimiser's state
    for _ in range(repeats):
        for name, variant in variants.items():
            seconds[name].append(variant.seconds())
    del variants
    return {name: StepCost(seconds[name], kept[name]) for name in VARIANTS}


def added_memory(name: str, config: dict, latent: tuple, captions: tuple, *, last: int, device: str) -> int:
    """`step_memory` in a new process, since the peak of a process never falls."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(step_memory, name, config, latent, captions, last, device, torch.get_num_threads()).result()


def run(*, device: str = "auto", repeats: int = 7) -> BenchResult:
    """Times a training step of trunk and head, against diffusers' own forward and under each objective.

    Args:
        device: `cpu`, `cuda`, or `auto` for cuda if there is a GPU.
        repeats: number of timed, interleaved steps of each variant.
    """
    device = choose_device(device)
    measured = compare(CONFIG, LATENT, CAPTIONS, last=RETRAINED, device=device, repeats=repeats)
    added = {name: added_memory(name, CONFIG, LATENT, CAPTIONS, last=RETRAINED, device=device) for name in VARIANTS}
    ours = measured[TRUNK_HEAD]
    best = min(ours.seconds)
    rows = []
    for name, values in measured.items():
        seconds = values.seconds
        rows.append([
            name,
            f"{min(seconds):.3f} ({statistics.median(seconds):.3f}, {max(seconds):.3f})",
            f"{min(seconds) / best:.2f}",
            f"{added[name] / 2**20:.0f}", f"{added[name] / added[TRUNK_HEAD]:.2f}",
            f"{values.saved / 2**20:.0f}", f"{values.saved / ours.saved:.2f}",
        ])  # fmt: skip
    vision = LATENT[1] * LATENT[2] * LATENT[3] // CONFIG["patch_size"] ** 2
    return BenchResult(
        title=f"One training step: {CONFIG['num_layers']} blocks, "
        f"{CONFIG['num_attention_heads'] * CONFIG['attention_head_dim']} wide, last {RETRAINED} retrained, "
        f"batch {len(CAPTIONS)} x ({vision} vision + {CAPTIONS} text tokens)",
        columns=("variant", "s/step: best (median, worst)", "ratio", "step adds (MiB)", "ratio",
                 "activations kept (MiB)", "ratio"),
        rows=rows,
        notes=(
            f"{repeats} steps of each variant, interleaved; float32; forward, backward, clipping, AdamW. "
            "Ratios of the best steps: other work on the machine can only make a step slower.",
            "'Step adds' is peak memory above the built model in a process of its own: activations, gradients, "
            "optimiser state. A frozen trunk makes no graph in diffusers' forward either, as long as no leaf outside "
            "the blocks is trainable; the third line has one.",
            "Objectives `velocity` and `blocks` also run copies of the base's own blocks, which the built model has.",
        ),
        device=device,
    )  # fmt: skip
