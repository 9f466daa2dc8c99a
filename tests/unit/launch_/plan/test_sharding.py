"""Every overlay of `recipes/cluster` as it is planned: its strategy, and its memory beside the others'."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.main import main
from launch.plan import estimate
from launch.plan.sharding import Sharding, read_sharding
from tests.support.plans import CLIP, recipe
from trainer.parallel.combinations import NO_DEEPSPEED

OVERLAYS = Path(__file__).resolve().parents[4] / "recipes" / "cluster"


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The plan of each overlay on two nodes of eight ranks, by its name; that without any under ""."""
    options = recipe(tmp_path_factory.mktemp("overlays"), trainer={"devices": 8, "num_nodes": 2})
    found = {"": estimate([*options, *CLIP])}
    for overlay in sorted(OVERLAYS.glob("*.yaml")):
        found[overlay.stem] = estimate([*options, "--config", str(overlay), *CLIP])
    return found


@pytest.mark.slow
def test_every_overlay_is_planned_as_its_own_strategy(plans):
    assert {name: plan.strategy for name, plan in plans.items() if name} == {
        "ddp": "ddp", "fsdp2": "fsdp2", "fsdp2_head": "fsdp2", "bf16": "ddp", "checkpointing": "ddp", "compile": "ddp",
        "zero1": "zero1", "zero2": "zero2", "zero3": "zero3",
    }  # fmt: skip


@pytest.mark.slow
def test_the_more_is_spread_the_less_a_gpu_holds(plans):
    need = {name: plan.bytes_per_gpu for name, plan in plans.items()}
    assert need["fsdp2"] < need["fsdp2_head"] < need["ddp"] < need[""]  # without an overlay DDP's buckets are copies
    assert need["zero3"] < need["zero2"] < need["zero1"] < need[""]
    assert need["bf16"] < need[""] and need["checkpointing"] < need[""] and need["compile"] == need[""]


@pytest.mark.slow
def test_the_head_alone_leaves_the_trunk_whole_and_off_the_wire(plans):
    head, every = plans["fsdp2_head"], plans["fsdp2"]
    trunk = head.parameters.trunk
    assert trunk > 0 and head.parts["weights"] - every.parts["weights"] == trunk - trunk // 8
    assert {name: head.parts[name] for name in ("gradients", "optimiser", "ema")} == {
        name: every.parts[name] for name in ("gradients", "optimiser", "ema")
    }
    gathered = {name: [one.what for one in plans[name].wire["fsdp2"]] for name in ("fsdp2", "fsdp2_head")}
    assert "trunk's blocks" in gathered["fsdp2"] and "trunk's blocks" not in gathered["fsdp2_head"]


@pytest.mark.slow
def test_the_plan_says_that_fit_refuses_deepspeed(plans, tmp_path, capsys):
    assert {name for name, plan in plans.items() if plan.refused} == {"zero1", "zero2", "zero3"}
    options = recipe(tmp_path, trainer={"devices": 2})
    for overlay, refused in (("zero2", True), ("fsdp2_head", False)):
        main(["plan", *options, "--config", str(OVERLAYS / f"{overlay}.yaml"), *CLIP])
        lines = capsys.readouterr().out.splitlines()
        assert [line for line in lines if NO_DEEPSPEED in line] == lines[-1:] * refused
    main(["plan", *options, "--trainer.gradient_clip_val=1", *CLIP])
    assert "`fit` refuses this: got trainer.gradient_clip_val 1" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["deepspeed_stage_3", "deepspeed", "ddp_find_unused_parameters_true"])
def test_lightnings_names(kind):
    assert read_sharding(kind, 8).name == {"deepspeed_stage_3": "zero3", "deepspeed": "zero2"}.get(kind, "ddp")


@pytest.mark.parametrize("given", [{"stage": 0}, {"stage": 3, "offload_optimizer": True}])
def test_what_deepspeed_can_do_beyond_is_not_planned(given):
    strategy = {"class_path": "lightning.pytorch.strategies.DeepSpeedStrategy", "init_args": SimpleNamespace(**given)}
    with pytest.raises(ValueError, match="without offloading"):
        read_sharding(strategy, 8)


def test_a_mesh_over_all_ranks_is_read_with_the_trunks_place():
    given = SimpleNamespace(shard_over="all", shard_trunk=False)
    strategy = {"class_path": "trainer.parallel.strategies.ShardedStrategy", "init_args": given}
    assert read_sharding(strategy, 8) == Sharding("fsdp2", over_node=False, shard_trunk=False)
    assert read_sharding({"class_path": strategy["class_path"]}, 8) == Sharding("fsdp2")
