"""`reblock demo`: runs every stage from video files to a report on a tiny model."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.run_folder import RunFolder
from trainer import run_files

_RECIPES = Path(__file__).resolve().parents[2] / "recipes"

CLIPS = 384
CAPTIONS = [
    "a red circle moves right over a dark gray background",
    "a yellow star moves down over a dark blue background",
    "a green square moves up and left over a light brown background",
]
#: Control -> overlays of recipes/demo.yaml. `keep` learns from the data, since under the demo's objective the base,
#: which it starts from, is the teacher too; `flow` is what it is to be compared with.
CONTROLS = {
    "flow": ("objectives/flow",),
    "keep": ("objectives/flow", "controls/keep"),
    "sham": ("controls/demo_sham",),
    "untrained": ("controls/untrained",),
}
MASK_RATIO = 0.5
#: Guidance scale; lower than Mochi's 4.5, since a model this small draws cleaner shapes with less guidance.
GUIDANCE = 2.0


@dataclass(frozen=True)
class DemoStage:
    """One stage of the demo.

    Args:
        name: name of the stage's result.
        command: equivalent command line.
        run: function that runs the stage.
        output: path that exists once the stage is complete, so that it is skipped; None if the stage resumes by itself.
    """

    name: str
    command: str
    run: Callable[[], object]
    output: Path | None = None


def _fit_arguments(run: Path, base: Path, latents: Path, overlays: Sequence[str] = ()) -> list[str]:
    """Arguments of `reblock`: one rank for each of two cores, since one rank of so small a model cannot use both."""
    ranks = min(2, len(os.sched_getaffinity(0)))
    recipes = [f"--config={_RECIPES / name}.yaml" for name in ("demo", *overlays)]
    return [
        "fit", *recipes, "--run.name", run.name, "--run.root", str(run.parent), "--run.resume", "true",
        "--model.base", str(base), "--data.shards", str(latents),
        "--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto",
    ]  # fmt: skip


def _fit(arguments: list[str]) -> None:
    """Runs `reblock fit` in a process of its own, which starts the other rank."""
    command = [sys.executable, "-m", "launch.main", *arguments]
    # A folder of the caller's with the name of a package of ours must not be imported: not by the other rank either.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    status = subprocess.run(command, env=environment).returncode
    if status:
        raise SystemExit(status)


def _stages(root: Path, controls: bool) -> list[DemoStage]:
    from data.encode.command import encode
    from data.pack.command import pack
    from data.synth.command import synth
    from launch.compare.command import compare
    from launch.export import export
    from launch.report.command import report
    from launch.sample.command import sample

    data, run = root / "demo-data", root / "demo"
    clips, shards, latents = data / "clips", data / "shards", data / "latents"
    base, retrained = _RECIPES / "demo_base", run / "pipeline"

    def fit(name: str, to: Path, overlays: Sequence[str] = ()) -> DemoStage:
        arguments = _fit_arguments(to, base, latents, overlays)
        return DemoStage(name, shlex.join(["reblock", *arguments]), lambda: _fit(arguments), to / run_files.GRAFT)

    def draw() -> None:
        sample(
            run / "samples", base=base, retrained=retrained, captions=CAPTIONS, mask_ratio=MASK_RATIO, guidance=GUIDANCE
        )

    stages = [
        DemoStage("clips", f"reblock synth {clips} --clips {CLIPS}", lambda: synth(clips, clips=CLIPS)),
        DemoStage(
            "video shards",
            f"reblock pack {clips} {shards} --shard_samples 64",
            lambda: pack(str(clips), shards, shard_samples=64),
        ),
        DemoStage(
            "latent shards",
            f"reblock encode {shards} {latents} --base {base}",
            lambda: encode(str(shards), latents, base=base),
        ),
        fit("retraining", run),
        DemoStage("pipeline folder", f"reblock export {run} {retrained}", lambda: export(run, retrained), retrained),
        DemoStage("samples", f"reblock sample {run / 'samples'} --base {base} --retrained {retrained} ...", draw),
    ]
    if controls:
        stages += [fit(f"control {name}", root / f"demo-{name}", overlays) for name, overlays in CONTROLS.items()]
        runs, out = [run, *(root / f"demo-{name}" for name in CONTROLS)], RunFolder(run).comparison
        command = shlex.join(["reblock", "compare", *map(str, runs), "--out", str(out)])
        stages.append(DemoStage("comparison", command, lambda: compare(*runs, out=out)))
    return [*stages, DemoStage("report", f"reblock report {run}", lambda: report(run))]


def demo(*, root: Path = Path("runs"), fresh: bool = False, controls: bool = False) -> None:
    """Runs all stages on the tiny model that Reblock ships; a second call skips what is complete.

    Args:
        root: folder for `demo-data` (clips, shards) and `demo` (the run).
        fresh: whether to remove the files of an earlier demo first.
        controls: whether to run the controls too, to ROOT/demo-NAME, and to put them beside the run in
            `demo/compare.html`, to which the report then links. They take several times as long as the retraining.
    """
    if fresh:
        for name in ("demo-data", "demo", *(f"demo-{name}" for name in CONTROLS)):
            shutil.rmtree(root / name, ignore_errors=True)
    started = time.perf_counter()
    stages = _stages(root, controls)
    for number, stage in enumerate(stages, start=1):
        since = time.perf_counter()
        print(f"\n[{number}/{len(stages)}] {stage.name}: {stage.command}", flush=True)
        if stage.output is not None and stage.output.exists():
            print(f"{stage.output} exists and is kept", flush=True)
            continue
        if number == len(stages):
            print(f"{time.perf_counter() - started:.0f} s for all stages before", flush=True)
        stage.run()  # the last stage ends by printing the report's path
        if number < len(stages):
            print(f"{time.perf_counter() - since:.0f} s", flush=True)
