"""`reblock bench scaling` counts what real ranks send, on a model that is small enough for that."""

import subprocess
from types import SimpleNamespace

import pytest

from launch.bench import scaling as bench_scaling
from launch.bench import step as bench_step
from tests.support.fork_server import Forked, popen
from trainer.step_figures import COUNTS, LOSSES

TINY = {**bench_step.CONFIG, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 6, "text_embed_dim": 16}


@pytest.fixture
def forked(monkeypatch) -> list[Forked]:
    """Starts several ranks without new interpreters, in which the bytes are the same; one process alone gets one."""
    started: list[Forked] = []

    def start(command, **how):
        if "WORLD_SIZE" not in how["env"]:
            return subprocess.Popen(command, **how)
        started.append(popen(command, **how))
        return started[-1]

    monkeypatch.delenv("PYTHONPATH", raising=False)
    names = SimpleNamespace(Popen=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(bench_scaling, "subprocess", names)
    return started


@pytest.mark.slow
def test_bytes_under_ddp_are_those_of_the_gradients_and_the_steps_figures(forked):
    one, two = bench_scaling.measure("one process", 1, 1, TINY), bench_scaling.measure("ddp", 2, 1, TINY)
    assert [type(process) for process in forked] == [Forked, Forked]
    assert one["bytes"] == {} and one["gradients"] == two["gradients"] > 10_000
    assert len(one["seconds"]) == len(two["seconds"]) == 1 and min(one["seconds"] + two["seconds"]) > 0
    figures = 8 * (len(COUNTS) + 2 * len(LOSSES))  # float64: counts, sums of losses, and samples of each
    assert two["bytes"] == {"all_reduce": two["gradients"] + figures}


@pytest.mark.slow
def test_bytes_under_fsdp2_are_those_of_gradients_and_blocks(forked):
    found = bench_scaling.measure("fsdp2", 2, 1, TINY)
    trunk = found["blocks"] - found["gradients"]  # of two blocks
    # Every block for the forward pass, the retrained ones for the backward pass, which fetches one block ahead: also
    # the trunk's last, which it does not need.
    assert 2 * found["bytes"]["all_gather"] == found["blocks"] + found["gradients"] + trunk // 2
    # Parts of equal size have padding, and the norm of all gradients is a number for each.
    assert 0 <= found["bytes"]["all_reduce"] - found["gradients"] < found["gradients"] / 1000
