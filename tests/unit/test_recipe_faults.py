"""Faulty recipes and inputs are refused in a few lines before anything is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from data.shards.format import LATENT_FORMAT, VIDEO_FORMAT
from launch import main as command

ROOT = Path(__file__).resolve().parents[2]
ENTRY = {"name": "shard-000000.tar", "bucket": "7x32x32", "samples": 40, "bytes": 0}


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Recipes name files relative to the repository."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def tiny(tmp_path, config_json) -> dict:
    """A recipe that works but for its shards' content, which nothing may read."""
    shards = tmp_path / "latents"
    shards.mkdir()
    (shards / "shard-000000.tar").touch()
    index = {"format": LATENT_FORMAT, "channels": 4, "text_width": 16, "latents_mean": [0.0] * 4,
             "latents_std": [1.0] * 4, "shards": [ENTRY]}  # fmt: skip
    (shards / "index.json").write_text(json.dumps(index))
    return {
        "run": {"name": "tiny", "root": str(tmp_path / "runs"), "wandb": False},
        "trainer": {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False},
        "model": {
            "class_path": "trainer.module.RetrainBlocks",
            "init_args": {"base": str(config_json), "surgery": {"last": 2}},
        },
        "data": {
            "class_path": "data.modules.latents.LatentDataModule",
            "init_args": {"shards": str(shards), "val_samples": 8, "batch_size": 4},
        },
    }


class Loaded(Exception):
    """A model was about to be loaded."""


@pytest.fixture
def refusal(tmp_path, monkeypatch, capsys):
    """(recipe, *options) -> what `reblock fit` says when it refuses; exit code 2, no traceback, nothing loaded."""

    def loads(*args, **kwargs):
        raise Loaded

    monkeypatch.setattr("trainer.module.load_transformer", loads)
    monkeypatch.delenv("REBLOCK_TRACEBACK", raising=False)

    def run(recipe: dict, *options: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        with pytest.raises(SystemExit) as stop:
            command.main(["fit", "--config", str(path), *options])
        said = capsys.readouterr().err
        assert stop.value.code == 2, said
        assert "Traceback" not in said and "error" in said
        return said

    return run


def test_without_a_fault_the_model_is_loaded(tiny, tmp_path, refusal):
    """The control: what the other tests change is what is refused."""
    path = tmp_path / "good.yaml"
    path.write_text(yaml.safe_dump(tiny))
    with pytest.raises(Loaded):
        command.main(["fit", "--config", str(path)])


@pytest.mark.parametrize(
    ("where", "key", "value", "expected"),
    [
        (("run",), "nmae", "x", ("nmae", "name", "root", "resume", "save_every", "keep_best")),
        (("trainer",), "max_epoch", 3, ("max_epoch", "max_epochs", "accelerator")),
        (("model", "init_args"), "bse", "x", ("bse", "base", "surgery", "ema_decay")),
        (("model", "init_args", "surgery"), "first", 4, ("first", "last", "blocks", "init", "seed")),
        (("model", "init_args"), "optim", {"rate": 1}, ("rate", "lr", "warmup_steps", "clip_norm")),
        (("data", "init_args"), "batchsize", 4, ("batchsize", "batch_size", "shards", "num_workers")),
        ((), "modle", 1, ("modle", "model", "data", "trainer", "run")),
        (("model", "init_args"), "ema_decay", "slow", ("ema_decay", "slow", "float")),
        (("model", "init_args", "surgery"), "init", "xavier", ("init", "xavier", "dit", "torch", "normal")),
        (("run",), "save_every", "often", ("save_every", "often", "int")),
        (("data", "init_args"), "batch_size", 2.5, ("batch_size", "2.5", "int")),
    ],
)
def test_unknown_keys_and_wrong_types_name_what_exists(tiny, refusal, where, key, value, expected):
    part = tiny
    for name in where:
        part = part[name]
    part[key] = value
    said = refusal(tiny)
    assert [word for word in expected if word not in said] == [], said
    assert len(said) < 1500, said


@pytest.mark.parametrize(
    ("option", "nearest", "among"),
    [
        ("--model.optm.lr", "optim", "surgery"),
        ("--model.init_args.optm.lr", "optim", "surgery"),
        ("--model.optim.lrr", "lr", "warmup_steps"),
        ("--model.surgery.lst", "surgery.last", "blocks"),
        ("--data.shrds", "shards", "batch_size"),
        ("--run.nme", "run.name", "save_every"),
        ("--trainr.max_epochs", "trainer", "model"),
        ("--modl", "model", "trainer"),
    ],
)
def test_an_unknown_option_names_the_nearest_one_and_all_of_its_part(tiny, refusal, option, nearest, among):
    lines = [line.strip() for line in refusal(tiny, option, "1").splitlines()]
    assert f"nearest name: {nearest}" in lines
    [accepted] = [line for line in lines if line.startswith("accepted here: ")]
    assert {nearest.rpartition(".")[2], among} <= set(accepted.removeprefix("accepted here: ").split(", "))


def index_of(tiny: dict) -> Path:
    return Path(tiny["data"]["init_args"]["shards"]) / "index.json"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "has no index.json"),
        ({"shards": []}, "lists no sample"),
        ({"channels": 12, "latents_mean": [0.0] * 12, "latents_std": [1.0] * 12}, "(12, 2, 4, 4), the base"),
        ({"channels": 12}, "4 means and 4 deviations for 12 channels"),
        ({"shards": [ENTRY | {"bucket": "7x40x32"}]}, "got height 40, expected a multiple of 16"),
        ({"text_width": 4096}, "captions 4096 wide"),
        ({"format": VIDEO_FORMAT}, "Encode them first with `reblock encode`"),
        ({"shards": [ENTRY | {"name": "gone.tar"}]}, "40 in"),
        ({"shards": [ENTRY | {"samples": 8}]}, "val_samples 8 held out of 8"),
    ],
)
def test_shards_that_do_not_fit_are_refused(tiny, refusal, change, message):
    path = index_of(tiny)
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refusal(tiny)
    assert not Path(tiny["run"]["root"]).exists()


def test_absent_shards_are_refused(tiny, refusal):
    assert "nowhere does not exist; expected a folder written by `reblock encode`" in refusal(
        tiny, "--data.init_args.shards", "nowhere"
    )


@pytest.mark.parametrize(
    ("surgery", "message"),
    [
        ({}, "expected exactly one"),
        ({"last": 4}, "the model has 3 blocks"),
        ({"blocks": []}, "the list is empty"),
        ({"blocks": [1, 1]}, "repeated: [1]"),
        ({"blocks": [2, 3]}, "out of range: [3]"),
    ],
)
def test_faulty_block_lists_are_refused(tiny, refusal, surgery, message):
    tiny["model"]["init_args"]["surgery"] = surgery
    assert message in refusal(tiny)


def test_every_fault_of_model_and_shards_is_named_at_once(tiny, refusal):
    tiny["model"]["init_args"]["surgery"] = {"last": 9}
    index_of(tiny).unlink()
    said = refusal(tiny)
    assert "the model has 3 blocks" in said and "has no index.json" in said


@pytest.mark.parametrize("base", ["nowhere", "genmo/absent-model", "recipes", "recipes/demo_vae_config.json"])
def test_faulty_bases_are_refused(tiny, refusal, monkeypatch, base):
    monkeypatch.setattr("data.base_folder.scan_cache_dir", lambda: SimpleNamespace(repos=[]))
    said = refusal(tiny, "--model.init_args.base", base)
    assert base in said and "expected" in said or f"hf download {base}" in said


def test_an_unwritable_run_folder_is_refused(tiny, tmp_path, refusal):
    (tmp_path / "file").touch()
    assert "cannot write the run folder" in refusal(tiny, "--run.root", str(tmp_path / "file"))


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--run.save_every", "0", "expected at least 1 step"),
        ("--run.keep_best", "-2", "expected a count"),
        ("--run.name", "", "expected the name of a folder"),
        (
            "--run.bogus",
            "1",
            "accepted here: collective_timeout_s, keep_best, name, resume, root, save_every, save_failures, wandb, "
            "watchdog_s",
        ),
        (
            "--trainer.strategy",
            "trainer.parallel.strategies.ShardedStrategy",
            "expected auto, ddp, another of Lightning's names",
        ),
        ("--trainer.strategy", "deepspeed_stage_2", "got trainer.strategy DeepSpeedStrategy, expected DDP"),
        ("--trainer.precision", "64-true", "got trainer.precision '64-true'"),
        ("--trainer.gradient_clip_val", "1.0", "model.optim.clip_norm"),
        ("--data.global_batch_size", "0", "error: got batch_size 4 (per rank) and global_batch_size 0 (all ranks)"),
        ("--model.ema_decay", "2", "error: got EMA decay 2"),
        ("--trainer.devices", "0", "devices"),
    ],
)
def test_faulty_run_options_are_refused(tiny, tmp_path, refusal, option, value, expected):
    assert expected in refusal(tiny, option, value)
    assert not (tmp_path / "runs").exists()


def test_a_run_name_that_exists_is_refused(tiny, tmp_path, refusal):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "metrics.csv").write_text("step\n1\n")
    said = refusal(tiny)
    assert "run 'tiny' exists" in said and "--run.resume true" in said
    assert [p.name for p in run.iterdir()] == ["metrics.csv"]
