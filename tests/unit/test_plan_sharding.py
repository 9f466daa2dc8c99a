"""Every overlay of `recipes/cluster` as it is planned: its strategy, and its memory beside the others'."""

from pathlib import Path

import pytest

from launch.plan import estimate
from tests.planned import CLIP, SMALL, recipe

OVERLAYS = Path(__file__).resolve().parents[2] / "recipes" / "cluster"

#: Deep enough that what is spread outweighs the blocks that are whole at a time.
DEEP = SMALL | {"num_layers": 12}


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The plan of each overlay on two nodes of eight ranks, by its name; that without any under ""."""
    options = recipe(
        tmp_path_factory.mktemp("overlays"), config=DEEP, model={"surgery": {"last": 6, "init": "torch"}},
        trainer={"devices": 8, "num_nodes": 2},
    )  # fmt: skip
    found = {"": estimate([*options, *CLIP])}
    for overlay in sorted(OVERLAYS.glob("[!z]*.yaml")):
        found[overlay.stem] = estimate([*options, "--config", str(overlay), *CLIP])
    return found


def test_every_overlay_is_planned_as_its_own_strategy(plans):
    assert {name: plan.strategy for name, plan in plans.items() if name} == {
        "ddp": "ddp", "fsdp2": "fsdp2", "fsdp2_head": "fsdp2", "bf16": "ddp", "checkpointing": "ddp", "compile": "ddp",
    }  # fmt: skip


def test_the_more_is_spread_the_less_a_gpu_holds(plans):
    need = {name: plan.bytes_per_gpu for name, plan in plans.items()}
    assert need["fsdp2"] < need["fsdp2_head"] < need["ddp"] < need[""]  # without an overlay DDP's buckets are copies
    assert need["bf16"] < need[""] and need["checkpointing"] < need[""] and need["compile"] == need[""]


def test_the_head_alone_leaves_the_trunk_whole_and_off_the_wire(plans):
    head, every = plans["fsdp2_head"], plans["fsdp2"]
    trunk = head.parameters.trunk
    assert trunk > 0 and head.parts["weights"] - every.parts["weights"] == trunk - trunk // 8
    assert {name: head.parts[name] for name in ("gradients", "optimiser", "ema")} == {
        name: every.parts[name] for name in ("gradients", "optimiser", "ema")
    }
    gathered = {name: [one.what for one in plans[name].wire["fsdp2"]] for name in ("fsdp2", "fsdp2_head")}
    assert "trunk's blocks" in gathered["fsdp2"] and "trunk's blocks" not in gathered["fsdp2_head"]
