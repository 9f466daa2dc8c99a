"""`reblock submit --dry-run`: the script it shows, and what it refuses, all of it at once and with nothing written."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from launch import main as command
from launch.cluster.options import EncodeStage, ExportStage, JobConfig, seconds
from tests.support.latent_shards import write_latents

ROOT = Path(__file__).resolve().parents[4]


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch, tmp_path):
    """No cluster around the tests, and a current folder of their own."""
    monkeypatch.setattr("launch.slurm.shutil.which", lambda name: None)
    monkeypatch.setattr("launch.slurm.ask", lambda *words: None)
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe(tmp_path, config_json) -> dict:
    """Two ranks on two nodes, 40 samples."""
    write_latents(tmp_path / "latents", [("7x32x32", 40)], channels=4, width=16)
    return {
        "run": {"name": "tiny", "root": "runs", "wandb": False},
        "trainer": {"accelerator": "cpu", "devices": 1, "strategy": "ddp", "max_epochs": 1},
        "model": {
            "class_path": "trainer.module.RetrainBlocks",
            "init_args": {"base": str(config_json), "surgery": {"last": 2}},
        },
        "data": {
            "class_path": "data.modules.latents.LatentDataModule",
            "init_args": {"shards": "latents", "val_samples": 8, "global_batch_size": 4},
        },
    }


@pytest.fixture
def submit(tmp_path, capsys):
    """(recipe, *options) -> (what was printed, what was refused); exit code 2 and no file where there was a fault."""

    def run(recipe: dict, *options: str) -> tuple[str, str]:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        before = sorted(tmp_path.rglob("*"))
        code = 0
        try:
            command.main(["submit", "--config", "recipe.yaml", *options])
        except SystemExit as stop:
            code = stop.code
        printed = capsys.readouterr()
        assert code == (2 if "error: " in printed.err else 0), printed.err
        assert sorted(tmp_path.rglob("*")) == before
        assert "Traceback" not in printed.err
        return printed.out, printed.err

    return run


def directives(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.M))


def test_the_script_of_two_nodes(submit, recipe, tmp_path):
    script, refused = submit(recipe, "--nodes", "2", "--dry-run", "--time", "1:00:00", "--cpus-per-task=4")
    assert refused == ""
    asked = directives(script)
    assert {"nodes": "2", "ntasks-per-node": "1", "cpus-per-task": "4", "time": "1:00:00"}.items() <= asked.items()
    assert asked["signal"] == "USR1@600" and asked["open-mode"] == "append" and asked["requeue"] == ""
    assert asked["chdir"] == str(tmp_path) and asked["output"] == f"{tmp_path}/runs/tiny/logs/%x-%j.log"
    assert "ntasks" not in asked and "gpus-per-node" not in asked
    assert "export NCCL_DEBUG=WARN" in script and "REBLOCK_REQUEUE=script" in script
    assert "unset MASTER_ADDR" in script and "--run.resume true" in script
    assert '-r"$restarts"-%t.log' in script and "SRUN_CPUS_PER_TASK" in script
    assert script.rstrip().splitlines()[-3] == 'exit "$status"'
    assert script.rstrip().endswith(f"# dry run: sbatch {tmp_path}/runs/tiny/job.sbatch")
    assert max(len(line) for line in script.splitlines() if str(tmp_path) not in line) <= 140
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_options_may_come_from_an_overlay(submit, recipe, tmp_path):
    overlay = {
        "partition": "gpu", "account": "video", "time": "12:00:00", "modules": ["cuda/12.4", "nccl"],
        "setup": ["source /opt/site/env.sh"], "env": {"NCCL_IB_TIMEOUT": 22, "NCCL_SOCKET_IFNAME": "ib0"},
        "slurm": ["--gres=gpu:4", "--comment=a b"], "signal": "USR2", "max_requeues": 0,
        "trainer": {"accelerator": "gpu", "devices": 4},
    }  # fmt: skip
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(overlay))
    script, refused = submit(recipe, "--config", "site.yaml", "--dry-run", "--after", "12,13_1")
    assert refused == ""
    asked = directives(script)
    assert asked["partition"] == "gpu" and asked["gres"] == "gpu:4" and asked["comment"] == '"a b"'
    assert "gpus-per-node" not in asked and asked["ntasks-per-node"] == "4"
    assert asked["signal"] == "USR2@600" and "REBLOCK_STOP_SIGNAL=SIGUSR2" in script
    assert "no-requeue" in asked and "requeue" not in asked
    lines = script.splitlines()
    order = [lines.index(text) for text in ("module load cuda/12.4 nccl", "source /opt/site/env.sh",
                                            "export NCCL_IB_TIMEOUT=22", "export NCCL_SOCKET_IFNAME=ib0")]  # fmt: skip
    assert order == sorted(order)
    assert "# dry run: sbatch --dependency=afterok:12:13_1,singleton " in script


def test_the_reference_job_on_eight_nodes(submit, monkeypatch, capsys):
    """Its base and shards are not here, and its global batch is too small: said, beside the script."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        command.main(["submit", "--config", "recipes/mochi_last4.yaml", "--nodes", "8", "--dry-run"])
    printed = capsys.readouterr()
    asked = directives(printed.out)
    assert {
        "nodes": "8",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "job-name": "mochi-last4",
    }.items() <= asked.items()
    assert "8 nodes x 8 GPUs = 64 ranks" in printed.out
    assert "got global_batch_size 8 on 64 ranks, expected a multiple of the ranks: 64" in printed.err
    assert "latents/train does not exist" in printed.err and "hf download genmo/mochi-1-preview" in printed.err


def test_stages_run_one_after_the_other(submit, recipe, monkeypatch, tmp_path):
    recipe["model"]["init_args"]["base"] = str(ROOT / "recipes" / "demo_base")
    recipe["data"]["init_args"]["shards"] = "made"
    monkeypatch.setattr("launch.cluster.checks.find_shards", lambda *where: None)
    options = ["--stages=encode,fit,export", "--encode.shards=clips", "--encode.tasks=6", "--encode.at_once=3",
               "--encode.slurm=[--partition=small,--time=30]", "--partition=large", "--dry-run"]  # fmt: skip
    printed, refused = submit(recipe, *options)
    assert refused == ""
    encode, fit, export = ("#!/usr/bin/env bash" + text for text in printed.split("#!/usr/bin/env bash")[1:])
    asked = directives(encode)
    assert asked["array"] == "0-5%3" and asked["partition"] == "small" and asked["time"] == "30"
    assert asked["signal"] == "USR1@60" and asked["job-name"] == "tiny-encode"
    assert "reblock encode clips made" in encode and "REBLOCK_REQUEUE=script" in encode
    assert "unset MASTER_ADDR" not in encode and 'job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' in encode
    assert directives(fit)["partition"] == "large" and "array" not in directives(fit)
    assert f"reblock export {tmp_path}/runs/tiny {tmp_path}/runs/tiny/pipeline" in export
    assert export.rstrip().endswith(
        f"# dry run: sbatch {tmp_path}/runs/tiny/encode.sbatch\n"
        f"# dry run: sbatch --dependency=afterok:<encode's id>,singleton {tmp_path}/runs/tiny/job.sbatch\n"
        f"# dry run: sbatch --dependency=afterok:<fit's id> {tmp_path}/runs/tiny/export.sbatch"
    )
    for script in (encode, fit, export):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_containers(submit, recipe, tmp_path):
    script, _ = submit(recipe, "--dry-run", "--container_image", "nvcr.io#nvidia/pytorch:25.01-py3")
    assert f"--container-image='nvcr.io#nvidia/pytorch:25.01-py3' --container-mounts={tmp_path}:{tmp_path}" in script
    assert "\n  reblock fit " in script
    script, _ = submit(recipe, "--dry-run", "--apptainer_image=a.sif", "--container_mounts=/data:/data")
    assert f"\n  apptainer exec --bind /data:/data --pwd {tmp_path} a.sif reblock fit " in script


def test_every_fault_is_named_in_one_message(submit, recipe):
    recipe["trainer"] |= {"strategy": "ddp_spawn"}
    recipe["model"]["init_args"]["base"] = "gone"
    recipe["data"]["init_args"] |= {"shards": "nowhere", "global_batch_size": 5}
    recipe["run"]["name"] = "interactive"
    printed, refused = submit(recipe, "--nodes", "2", "--command", "reblock")
    assert printed == ""
    expected = (
        "got run.name 'interactive', expected another", "got strategy ddp_spawn, expected one whose ranks Slurm starts",
        "got global_batch_size 5 on 2 ranks", "gone", "nowhere does not exist", "sbatch is not here",
    )  # fmt: skip
    assert [text for text in expected if text not in refused] == [], refused


def test_what_the_trainer_refuses_is_refused_here(submit, recipe):
    recipe["trainer"]["enable_progress_bar"] = False
    assert "enable_progress_bar=False" in submit(recipe, "--dry-run", "--command", "reblock")[1]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"devices": "auto"}, [], "got trainer.devices 'auto', expected how many a node has"),
        ({"accelerator": "auto"}, [], "got trainer.accelerator 'auto', expected gpu or cpu"),
        ({}, ["--gpus_per_node=2"], "got gpus_per_node for a recipe with trainer.accelerator cpu"),
        ({"strategy": "single_device"}, ["--nodes=2"], "got strategy single_device on 2 ranks"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be(submit, recipe, change, options, message):
    recipe["trainer"] |= change
    assert message in submit(recipe, "--dry-run", *options)[1]


def test_gpus_of_a_node_are_the_devices_of_the_trainer(submit, recipe):
    recipe["trainer"] |= {"accelerator": "gpu", "devices": 8}
    script, _ = submit(recipe, "--dry-run", "--gpus_per_node=4")
    assert directives(script)["ntasks-per-node"] == "4" and directives(script)["gpus-per-node"] == "4"


def test_a_run_that_exists_is_refused_until_it_is_to_go_on(submit, recipe, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "metrics.csv").write_text("")
    assert "run 'tiny' exists in runs/tiny" in submit(recipe, "--dry-run")[1]
    assert submit(recipe, "--dry-run", "--run.resume", "true")[1] == ""


def test_a_run_whose_job_is_still_queued_is_refused(submit, recipe, tmp_path, monkeypatch):
    (tmp_path / "runs" / "tiny" / "job").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "job" / "jobs.jsonl").write_text(json.dumps({"job": "77", "stage": "fit"}) + "\n{")
    monkeypatch.setattr("launch.slurm.ask", lambda *words: "JobId=77 JobState=PENDING\n" if "77" in words else None)
    assert "job 77 (fit) of this run is PENDING" in submit(recipe, "--dry-run", "--run.resume", "true")[1]


# -- options alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nodes": 0}, "got nodes 0, expected at least 1"),
        ({"stages": "fit,encode,fit"}, "got stages 'fit,encode,fit'"),
        ({"stages": "train"}, "expected one or more of encode, fit, export"),
        ({"time": "tomorrow"}, "got time 'tomorrow'"),
        ({"time": 86400}, "put the time into quotes"),
        ({"time": "10"}, "told to stop before it starts"),
        ({"signal": "TERM"}, "got signal 'TERM'"),
        ({"mem": "lots"}, "got mem 'lots'"),
        ({"env": {"A B": "1"}}, "got env ['A B']"),
        ({"env": {"A": "1\nrm -rf"}}, "expected text without line breaks"),
        ({"after": "12;rm"}, "got after ['12;rm']"),
        ({"slurm": ["--ntasks=8"]}, "use trainer.devices"),
        ({"slurm": ["--wrap=rm"]}, "the script is what runs"),
        ({"slurm": ["-p gpu"]}, "expected --key=value or --key"),
        ({"slurm": ["--comment=a\n#SBATCH --uid=0"]}, "expected --key=value or --key"),
        ({"partition": "a\nb"}, "got partition 'a\\nb'"),
        ({"container_image": "a", "apptainer_image": "b"}, "expected one of them"),
        ({"container_mounts": "/a:/b"}, "without an image"),
        ({"encode": EncodeStage(tasks=0)}, "got encode.tasks 0"),
        ({"encode": EncodeStage(options=["--dtype float32"])}, "got encode.options"),
        ({"export": ExportStage(slurm=["--output=x"])}, "logs lie in the run folder"),
    ],
)
def test_options_that_make_no_sense(options, message):
    faults = JobConfig(**options).faults()
    assert len(faults) == 1 and message in faults[0], faults


def test_options_that_are_right():
    assert JobConfig().faults() == []
    job = JobConfig(time="2-00:00:00", slurm=["--exclusive", "--comment=a; b"], after=12, stages="export, encode,fit")
    assert job.faults() == [] and job.after_list == ["12"] and job.stage_list == ["encode", "fit", "export"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("1-2", 93600), ("1-00:30", 88200), ("2-01:00:05", 176405),
     ("UNLIMITED", None)],
)  # fmt: skip
def test_time_limits(text, expected):
    assert seconds(text) == expected


def test_memory_above_a_gpus_is_refused(submit, recipe):
    """Blocks 3,072 wide, on latents of the recipe's channels: more than a GPU of 2 GiB has, less than one of 80."""
    config = json.loads(Path(recipe["model"]["init_args"]["base"]).read_text())
    wide = config | {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 3}
    Path("wide.json").write_text(json.dumps(wide))
    recipe["model"]["init_args"]["base"] = "wide.json"
    recipe["trainer"] |= {"accelerator": "gpu", "devices": 1}
    said = submit(recipe, "--dry-run", "--gpu_memory", "2")[1]
    assert re.search(r"would need \d+\.\d GiB of 2 GiB on each GPU with strategy", said), said
    assert submit(recipe, "--dry-run")[1] == ""


def test_the_environment_is_not_changed(submit, recipe):
    before = dict(os.environ) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}  # which every command sets
    submit(recipe, "--dry-run")
    assert {k: v for k, v in os.environ.items() if before.get(k) != v} == {}


def test_each_stage_is_held_against_the_partition_that_it_runs_in(submit, recipe, monkeypatch):
    """An export needs no GPU, a task of encode one; a raw option names the partition too."""
    known = {
        "scontrol": "PartitionName=cpu Default=YES TotalNodes=9 MaxTime=1-00:00:00\n"
        "PartitionName=gpu Default=NO TotalNodes=2 MaxTime=2:00:00\n",
        "sinfo": "cpu|8|(null)\ngpu|64|gpu:4\n",
    }
    monkeypatch.setattr("launch.slurm.ask", lambda *words: known.get(words[0]))
    monkeypatch.delenv("SBATCH_PARTITION", raising=False)
    recipe["trainer"] |= {"accelerator": "gpu", "devices": 4}
    refused = "cannot give what is asked"
    assert "partition cpu cannot give what is asked: GPUs of nodes that list none" in submit(recipe, "--dry-run")[1]
    for more in (["--partition=gpu"], ["--slurm=[--partition=gpu]"]):
        assert refused not in submit(recipe, "--dry-run", *more)[1], more
    assert refused not in submit(recipe, "--dry-run", "--stages=export", "--partition=cpu")[1]
    eight = ["--gpus_per_node=8", "--partition=gpu", "--dry-run"]
    assert "8 GPUs on a node of 4" in submit(recipe, *eight)[1]
    assert refused not in submit(recipe, *eight, "--stages=encode")[1]
    said = submit(recipe, "--dry-run", "--partition=gpu", "--slurm=[--time=3:00:00]")[1]
    assert "a time of 3:00:00 where 2:00:00 is the most" in said
    assert (
        "got partition gone, expected one of: cpu, gpu"
        in submit(recipe, "--dry-run", "--partition=gpu", "--stages=fit,export", "--export.slurm=[--partition=gone]")[1]
    )
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    assert refused not in submit(recipe, "--dry-run")[1]


def test_ranks_wait_longer_than_slurm_takes_to_give_a_node_up(submit, recipe, monkeypatch):
    assert "--wait=660 " in submit(recipe, "--nodes=2", "--dry-run")[0]
    config = "SlurmctldTimeout        = 120 sec\nSlurmdTimeout           = 900 sec\n"
    monkeypatch.setattr("launch.slurm.ask", lambda *words: config if "config" in words else None)
    assert "--wait=1860 " in submit(recipe, "--nodes=2", "--dry-run")[0]
    assert "--wait=20 " in submit(recipe, "--nodes=2", "--wait_seconds=20", "--dry-run")[0]
