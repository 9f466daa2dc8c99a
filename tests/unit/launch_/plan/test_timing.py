"""Seconds of collectives and steps, by hand."""

import pytest

from launch.plan import estimate
from launch.plan.counts import Collective
from launch.plan.hardware import Hardware
from launch.plan.timing import ComputeTime, collective_seconds, layouts, step_time, weak_scaling
from tests.support.plans import CLIP, recipe

#: Round figures: 100 bytes a second in a node, 40 from node to node, messages at once.
HARDWARE = Hardware(intra_gb_s=100e-9, inter_gb_s=40e-9, link_share=1.0, latency_us=1e-9)


def close(seconds):
    return pytest.approx(seconds, rel=1e-6)


def test_rings_by_hand():
    assert collective_seconds("all-gather", 400, 4, 1, HARDWARE) == close(3 / 4 * 4)
    assert collective_seconds("reduce-scatter", 400, 8, 2, HARDWARE) == close(7 / 8 * 10)
    assert collective_seconds("all-reduce", 400, 8, 2, HARDWARE) == close(2 * 7 / 8 * 10)
    assert collective_seconds("all-reduce", 400, 1, 1, HARDWARE) == 0


def test_the_parts_of_a_nodes_ranks_share_its_adapters():
    """Two nodes of four ranks: the four send their 100 bytes through the node's 40 bytes a second at the same time."""
    parts = Collective("all-reduce", "parts of gradients", (100,), 2, "head", True)
    found = step_time(ComputeTime(0.0, 0.0, 0.0, 0.0), [parts], 8, 4, HARDWARE)
    # In a ring of two each rank sends 2 (2 - 1) / 2 x 100 bytes, so the node 4 x 100, at 40 a second.
    assert found.wire == close(4 * 100 / 40) == close(found.bare) == close(found.overlapped)
    assert found.wire == close(collective_seconds("all-reduce", 4 * 100, 2, 2, HARDWARE))
    # One rank of a node has it to itself; what is not spread is one collective of all ranks.
    assert step_time(ComputeTime(0.0, 0.0, 0.0, 0.0), [parts], 2, 1, HARDWARE).wire == close(100 / 40)
    whole = Collective("all-reduce", "gradients", (400,), 8, "head")
    assert step_time(ComputeTime(0.0, 0.0, 0.0, 0.0), [whole], 8, 4, HARDWARE).wire == close(2 * 7 / 8 * 10)


@pytest.mark.parametrize(("accumulate", "seen", "deferred"), [(1, 4.0, 0.0), (4, 13.0, 10.0)])
def test_gradients_hide_behind_one_micro_batch_only(accumulate, seen, deferred):
    """16 seconds on the wire in four buckets; 16 of backward and 12 of trunk, in one micro-batch or in four.

    In one: three buckets go during the backward pass, the last, 4 seconds, at its end, or during the 12 of the trunk.
    In four: 4 seconds of backward, 3 of them once the first bucket is full, hide 3 of the 16; the trunk's 3 another 3.
    """
    buckets = Collective("all-reduce", "gradients", (100,) * 4, 2, "head")
    hardware = Hardware(intra_gb_s=25e-9, link_share=1.0, latency_us=1e-9)
    found = step_time(ComputeTime(12.0, 8.0, 16.0, 1.0, accumulate), [buckets], 2, 2, hardware)
    assert found.wire == close(16) and found.bare == close(37 + 16)
    assert found.overlapped == close(37 + seen)
    assert found.deferred == close(37 + deferred)


def test_rows_are_ranks_that_exist():
    powers = [2**power for power in range(13)]
    assert layouts(8, (1, 8)) == [(1, 1), (1, 2), (1, 4), *((nodes, 8) for nodes in powers[:10])]
    assert layouts(1, (1, 1)) == [(nodes, 1) for nodes in powers]
    six = layouts(6, (3, 6))
    assert six[:7] == [(1, 1), (1, 2), (1, 4), (1, 6), (2, 6), (3, 6), (4, 6)] and six[-1] == (512, 6)
    assert layouts(8, (1024, 8))[-1] == (1024, 8)  # beyond the table's end


def test_each_row_has_the_collectives_of_its_own_ranks():
    asked = []

    def collectives(nodes, ranks):
        asked.append((nodes, ranks))
        return [Collective("all-reduce", "gradients", (400,), nodes * ranks, "head")] if nodes * ranks > 1 else []

    found = weak_scaling(ComputeTime(1.0, 1.0, 2.0, 0.0), collectives, 6, (3, 6), HARDWARE)
    assert asked == layouts(6, (3, 6)) and [step.gpus for step in found] == [nodes * ranks for nodes, ranks in asked]
    alone, pair, *_ = found
    assert alone.wire == 0 and pair.wire == close(2 * 1 / 2 * 400 / 100)
    twelve = next(step for step in found if step.gpus == 12)
    assert twelve.wire == close(2 * 11 / 12 * 400 / 40)  # through two nodes' adapters


@pytest.mark.parametrize(
    ("trainer", "node_size", "row"),
    [
        ({"devices": 6, "num_nodes": 3}, 6, 18),
        ({"devices": 1}, 1, 1),
        ({"devices": "auto", "num_nodes": 3}, 1, 3),  # one process a node on a CPU
        ({"devices": "auto"}, 8, 1),
        ({"devices": "auto", "num_nodes": 3, "accelerator": "gpu"}, 8, 24),
        ({"devices": "0,2", "accelerator": "gpu"}, 2, 2),
    ],
)
def test_a_node_is_as_large_as_the_recipe_says(tmp_path, trainer, node_size, row):
    plan = estimate([*recipe(tmp_path, trainer=trainer), *CLIP])
    assert plan.node_size == node_size and plan.gpus == row
    assert row in [step.gpus for step in plan.scaling]
    assert all(step.gpus % node_size == 0 or step.gpus < node_size for step in plan.scaling)
