"""`reblock demo`: the whole road on two cores, from video files to a report, each stage by its command's function."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_RECIPES = Path(__file__).resolve().parents[2] / "recipes"

CLIPS = 256
#: The head of each of the last four blocks that the shipped base misses least, as `reblock plant` chooses by itself in
#: about a minute.
HEADS = ["4:3", "5:0", "6:3", "7:1"]
CAPTIONS = [
    "a red circle moves right over a dark gray background",
    "a yellow star moves down over a dark blue background",
    "a green square moves up and left over a light brown background",
]
MASK_RATIO = 0.5
#: A model this small draws cleaner shapes with less guidance than the real one's 4.5.
GUIDANCE = 2.0


@dataclass(frozen=True)
class Stage:
    """One stage: what it is, what it leaves, how it is done. Stages without `leaves` know themselves what is there."""

    name: str
    command: str
    act: Callable[[], object]
    leaves: Path | None = None


def _fit(recipe: Path, run: Path, base: Path, latents: Path) -> None:
    from launch.fit.cli import run as launch

    launch(
        ["fit", "--config", str(recipe), "--run.name", run.name, "--run.root", str(run.parent), "--run.resume", "true",
         "--model.base", str(base), "--data.shards", str(latents)]
    )  # fmt: skip


def _stages(root: Path) -> list[Stage]:
    from data.encode.command import encode
    from data.pack.command import pack
    from data.synth.command import synth
    from launch.demo.plant_sinks import plant
    from launch.export import export
    from launch.report.command import report
    from launch.sample.command import sample

    data, run = root / "demo-data", root / "demo"
    clips, shards, latents, base = data / "clips", data / "shards", data / "latents", data / "base"
    shipped, recipe, retrained = _RECIPES / "demo_base", _RECIPES / "demo.yaml", run / "pipeline"

    def draw() -> None:
        sample(
            run / "samples", base=base, retrained=retrained, captions=CAPTIONS, mask_ratio=MASK_RATIO, guidance=GUIDANCE
        )

    return [
        Stage("clips", f"reblock synth {clips} --clips {CLIPS}", lambda: synth(clips, clips=CLIPS)),
        Stage(
            "video shards",
            f"reblock pack {clips} {shards} --shard_samples 64",
            lambda: pack(str(clips), shards, shard_samples=64),
        ),
        Stage(
            "latent shards",
            f"reblock encode {shards} {latents} --base {shipped}",
            lambda: encode(str(shards), latents, base=shipped),
        ),
        Stage(
            "base with planted sinks",
            f"reblock plant {shipped} {base} --shards {latents} --heads ...",
            lambda: plant(shipped, base, shards=latents, heads=HEADS),
            base,
        ),
        Stage(
            "retraining",
            f"reblock fit --config {recipe}",
            lambda: _fit(recipe, run, base, latents),
            run / "graft.safetensors",
        ),
        Stage("pipeline folder", f"reblock export {run} {retrained}", lambda: export(run, retrained), retrained),
        Stage("samples", f"reblock sample {run / 'samples'} --base {base} --retrained {retrained} ...", draw),
        Stage("report", f"reblock report {run}", lambda: report(run)),
    ]


def demo(*, root: Path = Path("runs"), fresh: bool = False) -> None:
    """Runs the main job on the embedded tiny model; run again, it says what exists and redoes only what is missing.

    Args:
        root: folder for `demo-data` (clips, shards, base) and `demo` (the run).
        fresh: remove what an earlier demo left first.
    """
    if fresh:
        for name in ("demo-data", "demo"):
            shutil.rmtree(root / name, ignore_errors=True)
    started = time.perf_counter()
    stages = _stages(root)
    for number, stage in enumerate(stages, start=1):
        since = time.perf_counter()
        print(f"\n[{number}/{len(stages)}] {stage.name}: {stage.command}", flush=True)
        if stage.leaves is not None and stage.leaves.exists():
            print(f"{stage.leaves} exists and is kept", flush=True)
            continue
        if number == len(stages):
            print(f"{time.perf_counter() - started:.0f} s for all stages before", flush=True)
        stage.act()  # the last stage's last line says where the report is
        if number < len(stages):
            print(f"{time.perf_counter() - since:.0f} s", flush=True)
