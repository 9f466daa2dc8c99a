"""Every recipe in the repository builds its model, alone and under every overlay."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.strategies import DeepSpeedStrategy

from launch import main as command
from launch.demo.train_vae import TrainVae
from launch.fit.cli import recipe_cli
from launch.flat_recipe import flatten
from trainer.models.load import load_transformer
from trainer.module import RetrainBlocks
from trainer.parallel.strategies import ShardedStrategy

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.yaml"))
RECIPES += sorted(f"experiments/{path.name}" for path in (ROOT / "recipes" / "experiments").glob("*.yaml"))
#: Options of `reblock pack`, read by a test of their own.
PACK_OPTIONS = sorted(path.stem for path in (ROOT / "recipes" / "data").glob("*.yaml"))
OVERLAYS = sorted(path.stem for path in (ROOT / "recipes" / "cluster").glob("*.yaml"))
OBJECTIVES = sorted(path.stem for path in (ROOT / "recipes" / "objectives").glob("*.yaml"))
CONTROLS = sorted(path.stem for path in (ROOT / "recipes" / "controls").glob("*.yaml"))
#: Hub id of a published base -> its config.
PUBLISHED = {
    json.loads(path.read_text())["_name_or_path"]: str(path.relative_to(ROOT))
    for path in (ROOT / "recipes" / "transformers").glob("*.json")
}
STUDY_SETTINGS = sorted(path.stem for path in (ROOT / "recipes" / "studies").glob("*.yaml"))
ZERO = [name for name in OVERLAYS if name.startswith("zero")]


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    """Recipes name files relative to the repository."""
    monkeypatch.chdir(ROOT)


def recipe(name: str, tmp_path: Path, *more: str, overlay: str | None = None):
    """The recipe's objects on a CPU of one rank, with a stand-in for a base that is not here.

    An overlay's strategy is kept, and its precision; without one it is a single device's.
    """
    config = yaml.safe_load((ROOT / "recipes" / name).read_text())
    base = config["model"]["init_args"].get("base")
    if base and not Path(base).exists():
        stand_in = PUBLISHED.get(base, "recipes/demo_base_config.json")
        more = ("--model.init_args.base", stand_in, *more)
    plain = [] if overlay else ["--trainer.strategy", "auto", "--trainer.precision", "32-true"]
    configs = [f"recipes/{name}"] + ([f"recipes/cluster/{overlay}.yaml"] if overlay else [])
    return recipe_cli(
        [*(f"--config={config}" for config in configs), "--run.root", str(tmp_path), "--run.wandb", "false",
         "--trainer.accelerator", "cpu", "--trainer.devices", "1", *plain, *more],
        run=False,
    )  # fmt: skip


def test_every_yaml_file_is_read_by_a_test_here():
    known = {*RECIPES, *(f"cluster/{name}.yaml" for name in OVERLAYS), *(f"data/{name}.yaml" for name in PACK_OPTIONS)}
    known |= {f"objectives/{name}.yaml" for name in OBJECTIVES}
    known |= {f"studies/{name}.yaml" for name in STUDY_SETTINGS}
    known |= {f"controls/{name}.yaml" for name in CONTROLS}
    found = {
        path.relative_to(ROOT / "recipes").as_posix()
        for pattern in ("*.yaml", "*.yml")
        for path in (ROOT / "recipes").rglob(pattern)
    }
    assert found == known


@pytest.mark.parametrize("name", PACK_OPTIONS)
def test_options_of_pack_are_read(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["pack", str(tmp_path / "nowhere"), str(tmp_path / "out"), f"--config=recipes/data/{name}.yaml"])
    assert stop.value.code == 2 and "nowhere" in capsys.readouterr().err  # past the options, to the clips


@pytest.mark.parametrize("name", STUDY_SETTINGS)
def test_settings_of_studies_are_those_of_a_published_base(name, tmp_path, capsys):
    command.main(["plan", "--study", "sinks", f"--config=recipes/studies/{name}.yaml", f"--json={tmp_path / 'plan'}"])
    said = capsys.readouterr().out
    given = yaml.safe_load((ROOT / f"recipes/studies/{name}.yaml").read_text())
    assert given["base"] in PUBLISHED and f"{given['frames']} x {given['height']} x {given['width']}" in said
    assert json.loads((tmp_path / "plan").read_text())["calls"] > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_builds_its_teacher(name, tmp_path):
    module = recipe("demo.yaml", tmp_path, "--config", f"recipes/objectives/{name}.yaml").model
    assert [getattr(phase, name) for phase in module.phases] == [1.0]
    module.build("meta")
    assert (module.teacher is None) if name == "flow" else (len(module.teacher.blocks) == 4)


#: Control -> the values of the recipe that it changes, by the end of their names.
CHANGED = {
    "keep": {"surgery.init"},
    "untrained": {"optim.lr", "limit_train_batches", "max_epochs"},
    # As many blocks elsewhere; measurements follow the last ones too.
    "sham": {"surgery.last", "surgery.blocks", "layers", "scopes"},
}


@pytest.mark.parametrize("name", CONTROLS)
def test_a_control_differs_from_its_run_in_what_it_is_for(name, tmp_path):
    whole = "demo.yaml" if name.startswith("demo_") else "mochi_last4.yaml"
    plain, control = (recipe(whole, tmp_path, *more) for more in ((), ("--config", f"recipes/controls/{name}.yaml")))
    values, others = (flatten(cli.recipe) for cli in (plain, control))
    names = {re.sub(r"(\.\d+)$", "", key) for key in {*values, *others} if values.get(key) != others.get(key)}
    ends = CHANGED[name.removeprefix("demo_")]
    assert all(any(key.endswith(f".{end}") for end in ends) for key in names), names
    assert {end for end in ends if any(key.endswith(f".{end}") for key in names)} == ends
    for cli in (plain, control):
        cli.model.build("meta")
    assert len(control.model.blocks) == len(plain.model.blocks) == 4
    assert (control.model.blocks == plain.model.blocks) is ("sham" not in name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_model(name, tmp_path):
    cli = recipe(name, tmp_path)
    if isinstance(cli.model, TrainVae):
        assert sum(p.numel() for p in cli.model.vae.parameters()) > 0
        return
    assert isinstance(cli.model, RetrainBlocks)
    cli.model.build("meta")
    assert {p.device.type for p in cli.model.split_model.transformer.parameters()} == {"meta"}
    retrained = sum(p.numel() for p in cli.model.retrained_parameters().values())
    assert 0 < retrained <= sum(p.numel() for p in cli.model.split_model.transformer.parameters())
    assert sorted({type(c).__name__ for c in cli.trainer.callbacks} & {"RandomStateCheckpoint", "LastCheckpoint"})


def test_the_configs_are_those_of_the_published_models():
    """Millions of parameters as docs/models.md has them, counted by diffusers' classes."""
    counted = {
        name: round(sum(p.numel() for p in load_transformer(path, device="meta").parameters()) / 1e6)
        for name, path in PUBLISHED.items()
    }
    assert counted == {
        "genmo/mochi-1-preview": 10_028,
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": 1_419,
        "Wan-AI/Wan2.1-T2V-14B-Diffusers": 14_288,
        "hunyuanvideo-community/HunyuanVideo": 12_821,
        "THUDM/CogVideoX-2b": 1_694,
        "THUDM/CogVideoX-5b": 5_570,
    }


def test_the_reference_job_retrains_792_8_million_of_10_billion(tmp_path):
    model = recipe("mochi_last4.yaml", tmp_path).model
    model.build("meta")
    assert model.blocks == (44, 45, 46, 47)
    assert round(sum(p.numel() for p in model.retrained_parameters().values()) / 1e6, 1) == 792.8
    trunk = [p for n, p in model.split_model.transformer.named_parameters() if n not in model.retrained_parameters()]
    assert {p.dtype for p in trunk} == {torch.bfloat16, torch.float32} or {p.dtype for p in trunk} == {torch.bfloat16}
    assert {p.dtype for p in model.retrained_parameters().values()} == {torch.float32}


# -- overlays --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mochi_last4.yaml", "demo.yaml"])
@pytest.mark.parametrize("overlay", [name for name in OVERLAYS if name not in ZERO])
def test_every_overlay_goes_over_a_recipe(name, overlay, tmp_path):
    plain, cli = recipe(name, tmp_path), recipe(name, tmp_path, overlay=overlay)
    cli.model.check_trainer(cli.trainer)
    cli.model.build("meta")
    strategy, model = cli.trainer.strategy, cli.model
    ddp = {"find_unused_parameters": False, "gradient_as_bucket_view": True, "static_graph": False}
    changed = {
        "ddp": lambda: ddp.items() <= strategy._ddp_kwargs.items(),
        "fsdp2": lambda: strategy.shard_trunk and strategy.shard_over == "node",
        "fsdp2_head": lambda: not strategy.shard_trunk and strategy.shard_over == "node",
        "checkpointing": lambda: model.checkpoint_head,
        "bf16": lambda: (cli.trainer.precision, model.trunk_dtype) == ("bf16-mixed", torch.bfloat16),
        "compile": lambda: model.compile_part == "both",
    }
    assert changed[overlay]()
    assert isinstance(cli.trainer.strategy, ShardedStrategy) == overlay.startswith("fsdp2")
    assert cli.model.surgery == plain.model.surgery and cli.model.optim == plain.model.optim  # the rest is the recipe's


def test_overlays_go_over_each_other(tmp_path):
    more = [f"--config=recipes/cluster/{name}.yaml" for name in ("checkpointing", "bf16", "compile")]
    cli = recipe("demo.yaml", tmp_path, *more, overlay="fsdp2")
    assert isinstance(cli.trainer.strategy, ShardedStrategy) and cli.trainer.precision == "bf16-mixed"
    assert cli.model.checkpoint_head and cli.model.compile_part == "both"


@pytest.mark.parametrize("overlay", ZERO)
def test_retraining_under_zero_is_refused_with_what_to_take_instead(overlay, tmp_path):
    """Before its strategy is made: whether or not DeepSpeed is installed."""
    with pytest.raises(ValueError, match=r"got trainer.strategy DeepSpeedStrategy, .*fsdp2_head.yaml"):
        recipe("demo.yaml", tmp_path, overlay=overlay)


@pytest.mark.parametrize("overlay", ZERO)
def test_zero_overlays_configure_deepspeed(overlay, monkeypatch):
    """Up to where DeepSpeed itself would start: on GPUs only, which no test here has."""
    if importlib.util.find_spec("deepspeed") is None:  # what Lightning's constructor uses of it
        utils = SimpleNamespace(logging=SimpleNamespace(logger=SimpleNamespace(setLevel=lambda level: None)))
        monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(utils=utils))
        for name in ("_DEEPSPEED_AVAILABLE", "_DEEPSPEED_GREATER_EQUAL_0_16"):
            monkeypatch.setattr(f"lightning.pytorch.strategies.deepspeed.{name}", True)
    given = yaml.safe_load((ROOT / f"recipes/cluster/{overlay}.yaml").read_text())["trainer"]["strategy"]
    assert given["class_path"] == "lightning.pytorch.strategies.DeepSpeedStrategy"
    zero = DeepSpeedStrategy(**given["init_args"]).config["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["contiguous_gradients"]) == (int(overlay[-1]), True, True)
