"""Parameters, buckets, bytes on the wire and the size of a checkpoint, against what really is there."""

import json
import os
import sys
from pathlib import Path

import pytest

from launch.plan import estimate
from launch.plan.counts import Collective, Parameters, collectives, count_parameters, ddp_buckets
from launch.plan.sharding import Sharding
from tests.support.fork_server import popen
from tests.support.plans import CLIP, LATENT, SMALL, recipe
from trainer.callbacks.random_state import RandomStateCheckpoint
from trainer.checkpoint.io import BackgroundCheckpointIO
from trainer.module import RetrainBlocks, SurgeryConfig

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(
    ("surgery", "first"),
    [({"last": 2}, 2), ({"blocks": [0, 3]}, 0), ({"last": 4, "train_outside": True}, 0)],
)
@pytest.mark.parametrize("trunk_dtype", ["float32", "bfloat16"])
def test_parameters_are_those_of_the_built_module(tmp_path, surgery, first, trunk_dtype):
    if "train_outside" in surgery and trunk_dtype == "bfloat16":
        pytest.skip("refused: all of it is trained")
    plan = estimate([*recipe(tmp_path, model={"surgery": surgery, "trunk_dtype": trunk_dtype}), *CLIP])
    module = RetrainBlocks(
        base=str(tmp_path / "config.json"), surgery=SurgeryConfig(**surgery), trunk_dtype=trunk_dtype
    )
    module.build("cpu")
    every = list(module.split_model.transformer.parameters())
    assert plan.parameters.retrained == sum(p.numel() for p in every if p.requires_grad) > 0
    assert plan.parameters.frozen == sum(p.numel() for p in every if not p.requires_grad) > 0
    assert plan.parameters.first == first
    held = sum(p.numel() * p.element_size() for p in every)
    assert plan.parameters.outside + plan.parameters.trunk + plan.parameters.head == held == plan.parts["weights"]
    assert plan.parameters == count_parameters(module)


def test_a_checkpoint_is_as_large_as_the_file_that_is_written(tmp_path, make_batch, fit):
    plan = estimate([*recipe(tmp_path), *CLIP])
    module = RetrainBlocks(base=str(tmp_path / "config.json"), surgery=SurgeryConfig(last=2, init="torch"))
    batch = make_batch([5, 5], grid=LATENT[1:], channels=SMALL["in_channels"], text_width=SMALL["text_embed_dim"])
    trainer = fit(module, [batch, batch], callbacks=[RandomStateCheckpoint()], plugins=[BackgroundCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    trainer.strategy.checkpoint_io.wait()
    size = (tmp_path / "last.ckpt").stat().st_size
    assert size > 8e6
    assert plan.checkpoint == pytest.approx(size, rel=0.01)


# -- DDP's gradients on the wire -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("cap_mb", [None, 25, 1])
def test_ddp_sends_the_planned_bytes_in_the_planned_buckets(tmp_path, cap_mb):
    strategy = {"class_path": "lightning.pytorch.strategies.DDPStrategy", "init_args": {"bucket_cap_mb": cap_mb}}
    plan = estimate([*recipe(tmp_path, trainer={"devices": 2, "strategy": strategy}), *CLIP])
    (planned,) = plan.wire["ddp"]
    assert plan.strategy == "ddp" and planned.ranks == 2
    logs = [(tmp_path / f"rank-{rank}.log").open("w") for rank in (0, 1)]
    ranks = [
        popen(
            [sys.executable, ROOT / "tests" / "support" / "ddp_buckets.py", tmp_path, str(rank), json.dumps(cap_mb)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log,
        )
        for rank, log in enumerate(logs)
    ]  # fmt: skip
    try:
        assert [rank.wait(timeout=180) for rank in ranks] == [0, 0], (tmp_path / "rank-0.log").read_text()
    finally:
        for rank in ranks:
            rank.kill()
    for rank in (0, 1):
        sent = json.loads((tmp_path / f"sizes-{rank}.json").read_text())
        assert sum(sent) == planned.bytes == plan.parameters.gradients
        # In the order in which gradients come, which is not quite that of the parameters: a norm's weight, 256 bytes,
        # can fall into the bucket before.
        assert len(sent) == len(planned.sizes)
        assert max(abs(a - b) for a, b in zip(sorted(sent), sorted(planned.sizes), strict=True)) <= 1024
        assert planned.sent == planned.bytes  # 2 (R - 1) / R of them, for two ranks


def test_buckets_close_at_their_cap():
    mib = 2**20
    sizes = [30 * mib, mib, mib, 2 * mib]
    assert ddp_buckets(sizes, 25 * mib, first=mib) == [2 * mib, 32 * mib]
    assert ddp_buckets(sizes, 25 * mib, first=25 * mib) == [34 * mib]
    assert ddp_buckets([3, 2, 1], 25 * mib, first=mib) == [6]
    assert ddp_buckets([], 25 * mib, first=mib) == []


# -- the other strategies, by hand -----------------------------------------------------------------------------------

COUNTED = Parameters(
    retrained=100, frozen=1000, outside=80, trunk=600, head=400, gradients=400, largest_gradients=200,
    sizes=(200, 200), block_sizes=(150, 150, 150, 150, 200, 200), first=4,
)  # fmt: skip


def sent(sharding, nodes, per_node, **options):
    found = collectives(sharding, COUNTED, nodes, per_node, **{"accumulate": 1, "sixteen_bit": True, **options})
    return {(one.kind, one.what): one for one in found}


def test_one_rank_sends_nothing():
    assert all(not sent(Sharding(name), 1, 1) for name in ("single", "ddp", "fsdp2", "zero1", "zero3"))


def test_fsdp2_gathers_within_a_node_and_reduces_parts_between_nodes():
    found = sent(Sharding("fsdp2"), 2, 4)
    gathered, parts = found["all-gather", "trunk's blocks"], found["all-reduce", "parts of gradients"]
    assert (gathered.ranks, gathered.bytes, gathered.sent) == (4, 600, 450)
    assert found["all-gather", "head's blocks, twice"].bytes == 2 * 400
    assert found["reduce-scatter", "gradients"].sent == 300
    assert (parts.ranks, parts.spread, parts.bytes, parts.sent) == (2, True, 100, 100)
    whole = sent(Sharding("fsdp2", over_node=False), 2, 4)
    assert whole["all-gather", "trunk's blocks"].ranks == 8 and ("all-reduce", "parts of gradients") not in whole
    assert sent(Sharding("fsdp2"), 2, 4, accumulate=3)["all-gather", "trunk's blocks"].bytes == 3 * 600


def test_fsdp2_of_the_head_alone_gathers_no_block_of_the_trunk():
    whole, head = sent(Sharding("fsdp2"), 2, 4), sent(Sharding("fsdp2", shard_trunk=False), 2, 4)
    assert ("all-gather", "trunk's blocks") in whole
    assert head == {key: one for key, one in whole.items() if key != ("all-gather", "trunk's blocks")}


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_zero_1_and_2_send_two_psi_and_stage_3_gathers_the_trunk_too(name):
    assert sum(one.bytes for one in sent(Sharding(name), 2, 4).values()) == 2 * 2 * 100
    assert sum(one.bytes for one in sent(Sharding(name), 2, 4, sixteen_bit=False).values()) == 2 * 4 * 100
    third = sent(Sharding("zero3"), 2, 4)
    assert sum(one.bytes for one in third.values()) == 3 * 2 * 100 + 600
    assert {one.ranks for one in third.values()} == {8}


def test_a_ring_sends_each_byte_of_an_all_reduce_twice_but_for_one_rank():
    one = Collective("all-reduce", "gradients", (400, 400), 8, "head")
    assert (one.bytes, one.sent) == (800, 1400)
    assert Collective("all-gather", "blocks", (800,), 8, "trunk").sent == 700
