"""`reblock bench scaling`: seconds and communicated bytes of a training step on 1, 2, 4 processes of this machine.

Each process is a rank; the batch per rank is the same for any number of ranks. Bytes are the input sizes of gloo's
collectives in one step, as torch's profiler records them; the table also gives the bytes of the gradients.
"""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from launch.bench.result import BenchResult
from launch.bench.step import CAPTIONS, CONFIG, LATENT, RETRAINED, config_file, make_batch
from trainer.module import OptimConfig, RetrainBlocks, SurgeryConfig
from trainer.parallel.strategies import ShardedStrategy

#: Number of steps before timing, which allocate memory and optimiser state, and in which DDP rebuilds its buckets.
_WARM = 3
#: Largest duration of a run in seconds.
_DEADLINE = 1800
_BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "int": 4, "long int": 8, "unsigned char": 1}


class StepProfiler(Callback):
    """Measures seconds of each step after the warm-up, and then communicated bytes of one more step."""

    def __init__(self, repeats: int) -> None:
        self.counted = _WARM + repeats
        self.seconds: list[float] = []
        self.bytes: dict[str, int] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.counted:
            self._profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self._profile.start()
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.counted:
            self._profile.stop()
            self.bytes = collective_bytes(self._profile)
        elif batch_idx >= _WARM:
            self.seconds.append(time.perf_counter() - self._start)


def collective_bytes(profiled: profile) -> dict[str, int]:
    """Input bytes of this process in gloo's collectives, by the collective's name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    found: Counter[str] = Counter()
    for event in events:
        name = str(event.get("name", ""))
        if name.startswith("gloo:"):
            arguments = event["args"]
            for shape, kind in zip(arguments["Input Dims"], arguments["Input type"], strict=True):
                found[name.removeprefix("gloo:")] += _BYTES[kind] * torch.Size(shape).numel()
    return dict(found)


def _strategy(name: str) -> Any:
    if name == "ddp":
        return DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True, process_group_backend="gloo")
    return ShardedStrategy(process_group_backend="gloo") if name == "fsdp2" else "auto"


def train_rank(strategy: str, ranks: int, repeats: int, config: str, out: str) -> None:
    """Trains as one rank of a run; rank zero writes its measurements to the JSON file `out`."""
    torch.set_num_threads(1)
    module = RetrainBlocks(
        base=config, surgery=SurgeryConfig(last=RETRAINED, init="torch"), optim=OptimConfig(warmup_steps=1)
    )
    profiler, steps = StepProfiler(repeats), _WARM + repeats + 1
    batches = [make_batch(json.loads(Path(config).read_text()), LATENT, CAPTIONS)] * steps
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy=_strategy(strategy), max_epochs=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[profiler],
        use_distributed_sampler=False, default_root_dir=tempfile.gettempdir(),
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type] # a list works as a data set
    if trainer.is_global_zero:
        named = module.retrained_parameters().values()
        gradients = sum(p.numel() * p.element_size() for p in named)
        inside = [p for block in module.split_model.blocks for p in block.parameters()]
        blocks = sum(p.numel() * p.element_size() for p in inside)
        measured = {"seconds": profiler.seconds, "bytes": profiler.bytes, "gradients": gradients, "blocks": blocks}
        Path(out).write_text(json.dumps(measured))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def measure(strategy: str, ranks: int, repeats: int, model: dict[str, Any] = CONFIG) -> dict[str, Any]:
    """Trains a model of this config on `ranks` processes; returns the measurements of rank zero.

    Raises:
        RuntimeError: if a process fails, or the run takes too long.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    root = str(Path(__file__).resolve().parents[2])
    shared["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    with config_file(model) as config, tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "measured.json", Path(folder) / "log"
        arguments = (strategy, ranks, repeats, config, str(out))
        code = f"from launch.bench.scaling import train_rank; train_rank(*{arguments!r})"
        places: list[dict[str, str]] = [{}]
        if ranks > 1:  # with LOCAL_RANK set, Lightning starts no further process
            places = [{"WORLD_SIZE": str(ranks), "LOCAL_RANK": str(i), "NODE_RANK": "0"} for i in range(ranks)]
        with log.open("w") as said:
            started = [
                subprocess.Popen(
                    [sys.executable, "-c", code], env=os.environ | shared | place, stdout=said, stderr=said
                )
                for place in places
            ]
        try:
            status = [process.wait(_DEADLINE) for process in started]
        except subprocess.TimeoutExpired:
            status = [-1]
        finally:
            for process in started:
                process.kill()
                process.wait()
        if any(status):
            raise RuntimeError(f"{strategy} on {ranks} processes failed ({status}):\n{log.read_text()[-3000:]}")
        return json.loads(out.read_text())


def run(*, repeats: int = 7, processes: tuple[int, ...] = (1, 2, 4)) -> BenchResult:
    """Times a training step on several processes of this machine, and counts the bytes that they exchange.

    Args:
        repeats: number of timed steps of each strategy.
        processes: numbers of ranks, with one run for each.
    """
    rows = []
    for ranks in processes:
        for strategy in ("one process",) if ranks == 1 else ("ddp", "fsdp2"):
            measured = measure(strategy, ranks, repeats)
            seconds, sent = measured["seconds"], measured["bytes"]
            rows.append([
                str(ranks), strategy, f"{min(seconds):.2f} ({statistics.median(seconds):.2f}, {max(seconds):.2f})",
                f"{measured['gradients']:,}", *(f"{sent.get(name, 0):,}" for name in ("all_reduce", "all_gather")),
            ])  # fmt: skip
    vision = LATENT[1] * LATENT[2] * LATENT[3] // CONFIG["patch_size"] ** 2
    return BenchResult(
        title=f"A training step on several processes of this machine, each with a batch of {len(CAPTIONS)} x "
        f"({vision} vision + {CAPTIONS} text tokens); {CONFIG['num_layers']} blocks, last {RETRAINED} retrained",
        columns=("processes", "strategy", "s/step: best (median, worst)", "gradients (bytes)", "all-reduced (bytes)",
                 "all-gathered (bytes)"),
        rows=rows,
        notes=(
            f"{repeats} steps, 1 thread a process, gloo, float32. Bytes are of the tensors that rank 0 puts "
            "into collectives in one step: all-gathered is its own part, of which every rank receives all.",
            "gloo scatters a sum as an all-reduce of the whole: NCCL would send half of FSDP2's all-reduced bytes.",
            "Processes beyond the machine's cores share them: their seconds say what one machine does, not a cluster.",
        ),
    )  # fmt: skip
