"""The whole road on two nodes of a real Slurm, on the demo's recipe: encode as an array, then a fit that is told to
stop and goes on in a new allocation, then the export; beside it the same fit undisturbed."""

import csv
import json
import signal
import sys
from pathlib import Path

import pytest
import yaml
from diffusers import MochiTransformer3DModel

from data.pack.command import pack
from data.synth.command import synth
from tests.kills.comparison import compare_runs
from tests.support.fork_server import ROOT
from trainer.checkpoint.file import checkpoint_fault

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REBLOCK = Path(sys.executable).with_name("reblock")
#: 16 clips, 4 held out, 3 global batches of 4, each seen three times in an epoch.
CLIPS, STEPS, EPOCHS = 16, 9, 2
#: Before this step the ranks wait for the test.
HELD = 5


def _measurement(path: str, **more) -> dict:
    return {"class_path": f"trainer.callbacks.{path}", "init_args": {"prompts": 2, "sigmas": [0.5], **more}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Video shards, and what differs from the demo's recipe: two nodes, few samples, few probes."""
    home = tmp_path_factory.mktemp("road")
    synth(home / "clips", clips=CLIPS)
    pack(str(home / "clips"), home / "video", shard_samples=4)
    overlay = {
        "run": {"name": "road", "root": "runs", "save_every": 2, "wandb": False},
        "trainer": {
            "strategy": "ddp", "max_epochs": EPOCHS,
            "callbacks": [{"class_path": "tests.kills.step_trace.StepRecorder"},
                          _measurement("sinks.SinkFrequency"),
                          _measurement("masking.MaskingRobustness", ratios=[0.5], scopes=["retrained"]),
                          {"class_path": "tests.support.rank_faults.Gate",
                           "init_args": {"folder": str(home / "gates"), "steps": [HELD]}}],
        },
        "model": {"init_args": {"base": str(ROOT / "recipes" / "demo_base")}},
        "data": {
            "init_args": {"shards": "latents", "val_samples": 4, "batch_size": None, "global_batch_size": 4,
                          "passes": 3},
        },
        "nodes": 2, "time": "0:30:00", "signal_seconds": 60, "env": {"PYTHONPATH": str(ROOT)},
        "encode": {"shards": "video", "tasks": 2, "options": ["--batch_size=4", "--claim_timeout=20"]},
    }  # fmt: skip
    (home / "gates").mkdir()
    (home / "lab.yaml").write_text(yaml.safe_dump(overlay))
    return home


#: Options of `submit`.
RECIPES = ("--config", ROOT / "recipes" / "demo.yaml", "--config", "lab.yaml")


def jobs_of(printed: str) -> dict[str, str]:
    """Stage -> job, from what `submit` has printed and written."""
    run = Path(next(line for line in printed.splitlines() if line.startswith("run folder:")).split(": ")[1].strip())
    jobs = [json.loads(line) for line in (run / "job" / "jobs.jsonl").read_text().splitlines()]
    return {entry["stage"]: entry["job"] for entry in jobs}


def losses(run: Path) -> dict[int, str]:
    """Step -> its loss as it was written; every step once."""
    if not (run / "metrics.csv").is_file():
        return {}
    with (run / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]
    assert len(dict(rows)) == len(rows), f"doubled: {rows}"
    return dict(rows)


def logs(run: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in sorted((run / "logs").iterdir()))


def test_encoded_trained_signalled_requeued_resumed_and_exported(lab, folder):
    run, twin = folder / "runs" / "road", folder / "runs" / "twin"
    submitted = lab.run(REBLOCK, "submit", *RECIPES, "--stages", "encode,fit,export", cwd=folder, timeout=240,
                        PYTHONPATH=str(ROOT))  # fmt: skip
    jobs = jobs_of(submitted.stdout)
    assert lab.job(jobs["fit"])["Reason"] in ("Dependency", "None"), lab.job(jobs["fit"])
    fit = jobs["fit"]
    lab.until(
        lambda: lab.state(fit) in ("RUNNING", "CANCELLED"), "the fit's start", timeout=300, says=lambda: logs(run)
    )
    lab.wait(fit, "RUNNING")
    assert len(json.loads((folder / "latents" / "index.json").read_text())["shards"]) == 4
    encoders = {path.name for path in (run / "logs").glob(f"road-encode-{jobs['encode']}_?-r0-0.log")}
    assert len(encoders) == 2

    lab.until(lambda: (folder / f"gates/waits-{HELD}-1").exists(), "some steps", timeout=240, says=lambda: logs(run))
    during = lab.reblock("status", run).stdout
    assert f"fit {fit}, RUNNING, since" in during and "on node[1-2]" in during and "its time ends" in during
    lab.run("scancel", "--signal=USR1", fit)
    lab.until(lambda: lab.pending(signal.SIGUSR1, "reblock", "fit"), "the signal", says=lambda: logs(run))
    (folder / f"gates/open-{HELD}").touch()
    lab.until(lambda: lab.job(fit)["Restarts"] == "1", "a requeue", timeout=240, says=lambda: logs(run))
    before = losses(run)
    assert HELD <= len(before) <= HELD + 2

    other = jobs_of(lab.reblock("submit", *RECIPES, "--run.name", "twin", cwd=folder).stdout)["fit"]
    for job in (fit, jobs["export"], other):
        lab.wait(job, "COMPLETED", timeout=400)
    assert "asks Slurm to queue the job again" in lab.output(fit)
    stopped = (run / "logs" / f"road-{fit}-r0-0.log").read_text()
    assert f"stopped by the stop signal after step {HELD + 2}, exit status 75" in stopped, stopped[-3000:]
    resumed = (run / "logs" / f"road-{fit}-r1-0.log").read_text()
    assert "resuming" in resumed, resumed[-3000:]

    assert list(losses(run)) == list(range(STEPS * EPOCHS))
    assert losses(run) == losses(twin)
    assert before.items() <= losses(run).items()
    found = compare_runs(twin, run, 2)
    own = ("logs/", "pipeline/", "encode.sbatch", "export.sbatch")
    found.files = [name for name in found.files if not name.startswith(own)]
    assert not found.faults() and not found.repeated, (found, logs(run))
    assert not any(checkpoint_fault(path) for path in (run / "checkpoints").glob("*.ckpt"))
    assert json.loads((run / "fingerprint.json").read_text())["equal"] is True
    model = MochiTransformer3DModel.from_pretrained(run / "pipeline" / "transformer")
    assert len(model.transformer_blocks) == 8
    after = lab.reblock("status", run).stdout
    assert f"fit {fit}, COMPLETED" in after and "requeued once" in after
    assert f"step {STEPS * EPOCHS}, epoch {EPOCHS} of {EPOCHS}" in after
    assert "the fit has come to its end" in after and "none in the logs of the last start" in after, after


def test_cancelled_and_submitted_again_by_hand_it_goes_on(lab, folder):
    """On one node instead of two. One epoch, without measurements."""
    run, gates = folder / "runs" / "hand", folder / "gates-hand"
    if not (folder / "latents" / "index.json").is_file():
        lab.reblock("encode", "video", "latents", "--base", ROOT / "recipes" / "demo_base", cwd=folder)
    gates.mkdir()
    held = yaml.safe_load((folder / "lab.yaml").read_text())
    held["trainer"]["max_epochs"] = 1
    held["trainer"]["callbacks"] = [
        {"class_path": "tests.support.rank_faults.Gate", "init_args": {"folder": str(gates), "steps": [HELD]}}
    ]
    (folder / "hand.yaml").write_text(yaml.safe_dump(held))
    words = ("submit", *RECIPES[:2], "--config", "hand.yaml", "--run.name", "hand")
    fit = jobs_of(lab.reblock(*words, cwd=folder).stdout)["fit"]
    lab.until(lambda: (gates / f"waits-{HELD}-1").exists(), "some steps", timeout=240, says=lambda: logs(run))
    refused = lab.reblock(*words, "--run.resume", "true", cwd=folder, check=False)
    assert f"job {fit} (fit) of this run is RUNNING" in refused.stderr
    lab.run("scancel", fit)
    lab.wait(fit, "CANCELLED", timeout=240)
    (gates / f"open-{HELD}").touch()
    again = lab.submit(run / "job.sbatch", "--nodes=1", cwd=Path("/"))
    lab.wait(again, "COMPLETED", timeout=400)
    assert list(losses(run)) == list(range(STEPS))
    assert "resuming" in (run / "logs" / f"hand-{again}-r0-0.log").read_text()
