"""`reblock bench NAME`: imports a benchmark's module, reads its options and prints its table.

The keyword arguments of a benchmark's `run` are its command-line options.
"""

import importlib
from collections.abc import Sequence

from launch.bench.result import show

#: Name -> module with `run(...) -> BenchResult`, and what it measures in one line.
BENCHMARKS: dict[str, tuple[str, str]] = {
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
    "scaling": ("launch.bench.scaling", "seconds and bytes on the wire of a training step on 1, 2, 4 processes"),
    "studies": ("launch.bench.studies", "seconds and peak memory of every kind of unit of every study"),
    "full": ("launch.bench.full_size", "seconds per step and peak memory of a full-size model with random weights"),
}


def usage() -> str:
    """What `reblock bench --help` prints."""
    lines = [f"  {name:<10} {text}" for name, (_, text) in BENCHMARKS.items()]
    return "usage: reblock bench NAME [OPTIONS]\n\n" + "\n".join(lines) + "\n\n`reblock bench NAME --help` says more."


def run(argv: Sequence[str]) -> None:
    """Runs `bench NAME [OPTIONS]` and prints the results with versions and hardware.

    Raises:
        ValueError: if the benchmark or an option is unknown or invalid.
    """
    from launch.main import call

    name, *options = argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        return print(usage())
    if name == "kills":
        raise ValueError("got benchmark 'kills', which is a test now; expected `make kills`, in a clone of Reblock.")
    if name not in BENCHMARKS:
        known = "; ".join(f"{key} ({what})" for key, (_, what) in BENCHMARKS.items())
        raise ValueError(f"got benchmark {name!r}, expected one of: {known}.")
    module = importlib.import_module(BENCHMARKS[name][0])
    show(call(f"bench {name}", module.run, options))
