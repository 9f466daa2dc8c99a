"""`reblock bench NAME`: the benchmarks. Each is a module of its own; this one finds it and prints what it measured."""

import importlib
import platform
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

#: Name -> module with `run(options) -> list[Row]`, its columns, and what it measures in one line.
BENCHES: dict[str, tuple[str, str]] = {
    "step": ("launch.bench.step", "time and memory of a training step: trunk / head against diffusers' own forward"),
    "pack": ("launch.bench.pack", "files per second and peak memory of packing, against ffmpeg's own probing"),
    "encode": ("launch.bench.encode", "clips per second of the encoding stage, against the bare model calls"),
    "stream": ("launch.bench.stream", "samples per second of the stream, against plain webdataset and bare reading"),
    "attention": (
        "launch.bench.attention",
        "time, memory and error of the attention engine, against one dense forward",
    ),
    "checkpoint": (
        "launch.bench.checkpoint",
        "how long a checkpoint holds up training, written in the background and in the foreground",
    ),
    "kills": (
        "launch.bench.kills",
        "a run killed at random moments, against one that was not: what differs, what is lost",
    ),
    "scaling": ("launch.bench.scaling", "seconds and bytes on the wire of a training step on 1, 2, 4 processes"),
    "full": ("launch.bench.full_size", "seconds per step and peak memory of a full-size model with random weights"),
}

_RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the benchmarks can be told; each reads what concerns it. Fields as in `bench`."""

    device: str
    repeats: int
    config_json: Path
    frames: tuple[int, ...]
    height: int
    width: int
    text_tokens: int
    steps: int
    last: int
    clips: int
    samples: int
    workers: int
    base: Path
    tokens: tuple[int, ...] | None = None
    heads: int | None = None
    head_dim: int = 128
    dtype: str | None = None
    backends: tuple[str, ...] | None = None
    all: bool = False
    kills: int = 50
    ranks: int = 2
    seed: int = 0
    processes: tuple[int, ...] = (1, 2, 4)


@dataclass(frozen=True)
class Result:
    """A table: its title, columns, rows, and lines that go below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def bench(
    name: str,
    *,
    device: str = "auto",
    repeats: int = 7,
    config_json: Path = _RECIPES / "mochi1_transformer.json",
    frames: list[int] = [37, 163],  # noqa: B006 - read only, and the command line shows it
    height: int = 480,
    width: int = 848,
    text_tokens: int = 256,
    steps: int = 5,
    last: int = 4,
    clips: int = 1000,
    samples: int = 4000,
    workers: int = 2,
    base: Path = _RECIPES / "demo_base",
    tokens: list[int] | None = None,
    heads: int | None = None,
    head_dim: int = 128,
    dtype: str | None = None,
    backends: list[str] | None = None,
    all: bool = False,
    kills: int = 50,
    ranks: int = 2,
    seed: int = 0,
    processes: list[int] = [1, 2, 4],  # noqa: B006 - likewise
) -> None:
    """Runs one benchmark and prints its figures with versions and hardware.

    Args:
        name: `step`, `pack`, `encode`, `stream`, `attention`, `checkpoint`, `kills`, `scaling` or `full`.
        device: `cpu`, `cuda`, or `auto` for cuda where there is one.
        repeats: timed rounds of each variant, interleaved; not of kills, nor of full.
        config_json: full: the transformer's config; weights are random.
        frames: full: clip lengths, each 6k + 1; encode on a GPU: the first of them.
        height: full, and encode on a GPU: of the clips, in pixels, a multiple of 16.
        width: likewise.
        text_tokens: full: caption length.
        steps: full: training steps at each clip length.
        last: full: blocks retrained, from the end.
        clips: pack, encode: clips that are made and measured on.
        samples: stream: latents that are made and read.
        workers: pack, stream: processes.
        base: encode: pipeline folder whose encoders run.
        tokens: attention: lengths; None: 2,048 to 8,192 on a CPU, 11,130 to 44,776 on a GPU.
        heads: attention: None: 4 on a CPU, 24 on a GPU.
        head_dim: attention: width of a head.
        dtype: attention: float32, bfloat16 or float16; None: float32 on a CPU, bfloat16 on a GPU.
        backends: attention: of `dense`, `chunked`, `triton`; None: chunked and dense on a CPU, triton and chunked on a
            GPU.
        all: attention: `dense` above 2,048 tokens too, and `chunked` on a GPU above the smallest length.
        kills: kills: how often the run is killed.
        ranks: kills: processes that train together.
        seed: kills: of the moments, and of who is killed.
        processes: scaling: how many ranks, one run each.

    Raises:
        ValueError: if there is no such benchmark, or an option that it cannot take.
    """
    if name not in BENCHES:
        known = "; ".join(f"{key} ({what})" for key, (_, what) in BENCHES.items())
        raise ValueError(f"got benchmark {name!r}, expected one of: {known}.")
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(
        device=device, repeats=repeats, config_json=Path(config_json), frames=tuple(frames), height=height, width=width,
        text_tokens=text_tokens, steps=steps, last=last, clips=clips, samples=samples, workers=workers, base=Path(base),
        tokens=None if tokens is None else tuple(tokens), heads=heads, head_dim=head_dim, dtype=dtype,
        backends=None if backends is None else tuple(backends), all=all,
        kills=kills, ranks=ranks, seed=seed,
        processes=tuple(processes),
    )  # fmt: skip
    show(importlib.import_module(BENCHES[name][0]).run(options), device)


def environment(device: str) -> str:
    """Versions and hardware, in one line."""
    import torch

    from launch.versions import cpu_model
    from trainer.versions import package_versions

    found = package_versions(("torch", "triton", "lightning", "diffusers"))
    packages = [f"{package} {version or '?'}" for package, version in found.items()]
    if device.startswith("cuda"):
        hardware = torch.cuda.get_device_name(device)
    else:
        hardware = f"{cpu_model()}, {torch.get_num_threads()} thread(s)"
    return f"{hardware}; python {platform.python_version()}, {', '.join(packages)}, {sys.platform}"


def host_peak(*, reset: bool = False) -> int:
    """Peak resident bytes of this process; `reset` starts counting from what is resident now, where Linux allows it."""
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    # Linux hands ru_maxrss on to child processes, so it would show the parent's peak; VmHWM is a process's own.
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) * 1024


def show(result: Result, device: str) -> None:
    """Prints a result."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=result.title, title_justify="left")
    for index, column in enumerate(result.columns):
        table.add_column(column, justify="right" if index else "left")
    for row in result.rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has no width
    console.print(table)
    for line in (*result.notes, environment(device)):
        console.print(line, soft_wrap=True, highlight=False)
